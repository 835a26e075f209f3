"""`gptloom data`: any source to shards with one JSON line, and the three looks into what was prepared."""

from __future__ import annotations

import functools
import gzip
import http.server
import io
import json
import lzma
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from gptcore.config import UserError, check_config
from gptcore.corpus import segment_dirs
from gptcore.shards import Prepared, ShardSet, prepare
from gptcore.store import home_dir
from gptloom.flows.command.look import LOOKS, find_directories

KEYS = {"corpus", "vocab", "shards", "documents", "train_tokens", "val_tokens", "skipped", "seconds"}


@pytest.fixture
def prepared(small_text: Path, home: Path) -> Prepared:
    return prepare(check_config({"data": {"source": str(small_text)}, "model": {"block_size": 64}}), home)


@pytest.fixture
def experiment(small_text: Path, tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(f"data:\n  source: {small_text}\nmodel:\n  block_size: 64\n", encoding="utf-8")
    return str(path)


def look(what: str, target: str, *overrides: str) -> dict[str, Any]:
    result = LOOKS[what](find_directories(target, list(overrides)))
    json.dumps(result)  # it is printed
    return result


def test_an_experiment_leads_to_its_directories(prepared: Prepared, experiment: str) -> None:
    found = find_directories(experiment, [])
    assert found == {"corpus": prepared.corpus, "vocab": prepared.vocab, "shards": prepared.shards}
    with pytest.raises(UserError, match=r"not there yet; run `gptloom data"):
        find_directories(experiment, ["vocab.kind=byte"])
    with pytest.raises(UserError, match=r"not prepared.*run `gptloom data"):
        find_directories(experiment, ["data.val_fraction=0.3"])


def test_stats_count_what_is_there(prepared: Prepared, experiment: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = look("stats", experiment)
    tokens = result["tokens"]
    shard_set = ShardSet.open(prepared.shards)
    assert result["corpus"]["documents"] == 1
    assert result["shards"]["n_tokens"] == shard_set.n_tokens
    assert tokens["bytes_per_token"] == pytest.approx(shard_set.n_bytes["train"] / shard_set.n_tokens["train"])
    assert sum(row["share"] for row in tokens["commonest"]) <= 1
    assert tokens["unused_first"] == ["<unk>"]
    captured = capsys.readouterr()
    assert not captured.out
    assert "bytes per training token" in captured.err


@pytest.mark.parametrize("kind", ["corpus", "vocab", "shards"])
def test_verify_accepts_what_is_whole_and_names_what_is_not(prepared: Prepared, kind: str) -> None:
    """Guards the complete check: one flipped bit anywhere below the directory, and the file's name in the message."""
    directory = getattr(prepared, kind)
    assert look("verify", str(directory))["verified"] == [str(directory)]
    files = {
        "corpus": segment_dirs(prepared.corpus)[0] / "documents.parquet",
        "vocab": prepared.vocab / "tokenizer.json",
        "shards": ShardSet.open(prepared.shards).token_dirs[0] / "train_000000.bin",
    }
    raw = bytearray(files[kind].read_bytes())
    raw[len(raw) // 3] ^= 4
    files[kind].write_bytes(raw)
    with pytest.raises(UserError, match=files[kind].name):
        look("verify", str(directory))


def test_head_shows_the_beginning(prepared: Prepared, experiment: str) -> None:
    result = look("head", experiment)
    assert result["tokens"]["ids"][0] == 0
    assert result["records"][0]["text"].startswith(result["tokens"]["text"])
    assert result["ids"][:2] == ["<|endoftext|>", "<unk>"]


def test_a_folder_of_texts_is_not_called_damaged(tmp_path: Path) -> None:
    """Guards the user's files: the way out for a half-made directory is to delete it, which a folder of texts must never hear."""
    (tmp_path / "mine.txt").write_text("text", encoding="utf-8")
    with pytest.raises(UserError, match="holds no prepared data") as caught:
        find_directories(str(tmp_path), [])
    assert "delete" not in str(caught.value)
    with pytest.raises(UserError, match="no fields to change"):
        find_directories(str(tmp_path), ["data.split=tail"])


# --- with Prefect ---------------------------------------------------------------------------------------------------------


def command(*words: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "gptloom.flows.command.cli", "data", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.integration
def test_the_command_prepares_and_finds_again(small_text: Path) -> None:
    source = f"data.source={small_text}"
    code, first, errors = command("experiments/smoke.yaml", source, "vocab.kind=bpe", "vocab.size=400")
    assert code == 0, errors
    assert set(first) == KEYS
    assert all(Path(first[kind]).is_absolute() for kind in ("corpus", "vocab", "shards"))
    assert first["documents"] == 1
    assert first["train_tokens"] > first["val_tokens"] > 64
    code, again, errors = command("experiments/smoke.yaml", source, "vocab.kind=bpe", "vocab.size=400")
    assert code == 0, errors
    assert {key: again[key] for key in KEYS - {"seconds"}} == {key: first[key] for key in KEYS - {"seconds"}}
    code, looked, _ = command("verify", first["shards"])
    assert (code, looked["verified"]) == (0, [first["shards"]])
    code, failed, errors = command("experiments/smoke.yaml", "data.source=/no/such/file")
    assert (code, list(failed)) == (2, ["error"])
    assert failed["error"] in errors


def text(number: int) -> str:
    return "".join(f"paragraph {number} {i} of some text, long enough to be split\n\n" for i in range(200))


@pytest.fixture
def sources(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The same eight texts as one file, a folder of compressed files, Parquet, a zip, and behind a server."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [text(number) for number in range(8)]
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, value in enumerate(texts[:5]):
        (folder / f"{number}.txt.gz").write_bytes(gzip.compress(value.encode()))
    (folder / "5.md").write_text(texts[5], encoding="utf-8")
    with tarfile.open(folder / "6.tar.xz", "w:xz") as archive:
        info = tarfile.TarInfo("inside/6.txt")
        info.size = len(texts[6])
        archive.addfile(info, io.BytesIO(texts[6].encode()))
    (folder / "7.jsonl.xz").write_bytes(lzma.compress(json.dumps({"text": texts[7]}).encode()))
    served = tmp_path / "served"
    served.mkdir()
    (served / "all.txt").write_text("".join(texts), encoding="utf-8")
    pq.write_table(pa.table({"text": texts}), tmp_path / "all.parquet")
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive_zip:
        for number, value in enumerate(texts):
            archive_zip.writestr(f"{number}.txt", value)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {
            "txt": str(served / "all.txt"),
            "folder": str(folder),
            "parquet": str(tmp_path / "all.parquet"),
            "zip": str(tmp_path / "all.zip"),
            "http": f"http://127.0.0.1:{server.server_port}/all.txt",
        }
        server.shutdown()


@pytest.mark.integration
def test_every_kind_of_source_becomes_shards(prefect_server: None, sources: dict[str, str]) -> None:
    from gptloom.flows.data import data
    from gptloom.flows.forms import Overrides

    for name, source in sources.items():
        result = data(experiment=str(ROOT / "experiments" / "smoke.yaml"), overrides=Overrides(more=[f"data.source={source}"]))
        assert set(result) == KEYS, name
        assert result["documents"] == (1 if name in ("txt", "http") else 8), name
        assert ShardSet.open(result["shards"]).verify() > 0, name
        assert Path(result["shards"]).is_relative_to(home_dir()), name


def test_a_corpus_is_described_for_mlflow(prepared: Prepared, tmp_path: Path) -> None:
    """Guards the statistics in MLflow: the table in the form its pages read, and a plot that is a picture."""
    from gptloom.tasks.data import describe_corpus

    tags = describe_corpus(prepared.corpus, tmp_path / "corpus")
    table = json.loads((tmp_path / "corpus" / "sources.json").read_text(encoding="utf-8"))
    assert table["data"][0][table["columns"].index("documents")] == 1
    assert (tmp_path / "corpus" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(tags["mlflow.loggedArtifacts"]) == [{"path": "corpus/sources.json", "type": "table"}]

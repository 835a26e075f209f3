"""What a flipped bit in the data does to a command that reads it: the file is named, and no number comes out of it.

.venv/bin/pytest tests/test_damage.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

pytestmark = pytest.mark.integration

SETTINGS = ["train.max_steps=4", "train.warmup_steps=1", "evaluate.bootstrap=10", "data.val_fraction=0.2"]


def command(home: Path, *words: str | Path) -> tuple[int, dict[str, Any], str]:
    """Exit code, last line on stdout and stderr of a program that stands beside Python, or of a module of gptcore."""
    begin = [sys.executable, "-m"] if str(words[0]).startswith("gptcore") else []
    call = [*begin, *(str(Path(sys.executable).with_name("gptloom")) if word == "gptloom" else str(word) for word in words)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    done = subprocess.run(call, cwd=ROOT, env=kept | {"GPTLOOM_HOME": str(home)}, capture_output=True, text=True, timeout=240)
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


def flip(path: Path, at: float) -> None:
    """One bit of the byte at that share of a file; the file keeps its size."""
    raw = bytearray(path.read_bytes())
    raw[2 * int(at * len(raw) / 2)] ^= 1
    path.write_bytes(raw)


@pytest.fixture(scope="module")
def made(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a corpus, its shards and a trained model."""
    home = tmp_path_factory.mktemp("made") / "home"
    experiment = [ROOT / "experiments" / "tiny.yaml", f"data.source={small_text}", *SETTINGS]
    code, _, errors = command(home, "gptcore.train", *experiment, "--out", home / "runs" / "toy")
    assert code == 0, errors
    return home


@pytest.fixture
def copy(made: Path, home: Path) -> Path:
    return Path(shutil.copytree(made, home))


def only(home: Path, pattern: str) -> Path:
    (found,) = home.glob(pattern)
    return found


def refusal(home: Path, *words: str | Path) -> str:
    """The sentence a command ends with; it must be the user's to mend."""
    code, result, errors = command(home, *words)
    assert code == 2, (result, errors[-2000:])
    return str(result["error"])


def test_a_flipped_hold_out_gives_no_score(copy: Path, tmp_path: Path) -> None:
    """The headline number changed without a word, or the command ended in a bare IndexError."""
    checkpoint, shards = only(copy, "runs/toy/checkpoints/step_000004"), only(copy, "data/shards/*")
    flip(only(copy, "data/tokens/*/val_000000.bin"), 0.5)
    words = ("gptcore.evaluate", checkpoint, "--shards", shards, "--out", tmp_path / "out")
    assert "val_000000.bin: content differs" in refusal(copy, *words)
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_nothing_is_quantized_by_flipped_text(copy: Path, tmp_path: Path) -> None:
    """GPTQ fits the weights to what it reads."""
    checkpoint, shards = only(copy, "runs/toy/checkpoints/step_000004"), only(copy, "data/shards/*")
    flip(only(copy, "data/tokens/*/train_000000.bin"), 0.5)
    words = ("gptcore.quantize", checkpoint, "--method", "int4-gptq", "--shards", shards, "--out", tmp_path / "gptq")
    assert "train_000000.bin: content differs" in refusal(copy, *words)


def test_text_that_is_damaged_is_read_again_and_its_shards_are_the_same(
    copy: Path, made: Path, small_text: Path, tmp_path: Path
) -> None:
    """A bit in the Parquet of most columns decodes to other text; shards made of it verified as whole for ever."""
    other = Path(shutil.copytree(made, tmp_path / "other"))
    parquet = only(copy, "data/segments/*/documents.parquet")
    for at in (0.3, 0.5):
        flip(parquet, at)
    ids = []
    for home in (other, copy):
        words = (
            "gptcore.shards",
            ROOT / "experiments" / "tiny.yaml",
            f"data.source={small_text}",
            *SETTINGS,
            "vocab.kind=byte",
        )
        code, result, errors = command(home, *words)
        assert code == 0, errors
        (part,) = json.loads((Path(result["shards"]) / "manifest.json").read_text())["tokens"]
        ids.append((Path(result["shards"]) / part["directory"] / "train_000000.bin").read_bytes())
    assert ids[0] == ids[1]
    assert "documents.parquet: content differs" in errors


@pytest.mark.parametrize(
    "pattern", ["data/vocabs/*/tokenizer.json", "data/tokens/*/train_000000.bin", "data/shards/*/token_bytes.npy"]
)
def test_what_is_found_again_is_verified(copy: Path, small_text: Path, pattern: str) -> None:
    """`Cached` said that it is there; what is there was another vocabulary, other ids, other sizes."""
    path = only(copy, pattern)
    if path.suffix == ".json":  # a letter that the text has not
        path.write_bytes(path.read_bytes().replace(b'"s"', b'"q"'))
    else:
        flip(path, 0.7)
    words = ("gptcore.shards", ROOT / "experiments" / "tiny.yaml", f"data.source={small_text}", *SETTINGS)
    assert f"{path.name}: content differs" in refusal(copy, *words)


def test_a_flipped_manifest_is_no_manifest(copy: Path) -> None:
    """Counts of a manifest are numbers of the report; a digit that became another was shown."""
    path = only(copy, "data/corpora/*/manifest.json")
    text = path.read_text()
    at = text.index('"documents": ') + len('"documents": ')
    path.write_text(text[:at] + str(int(text[at]) ^ 1) + text[at + 1 :])
    code, result, errors = command(copy, "gptloom", "data", "stats", path.parent)
    assert code == 2, (result, errors)
    assert "manifest.json" in result["error"]


def test_the_gate_looks_at_no_damaged_hold_out(copy: Path, tmp_path: Path) -> None:
    """What decides whether a model goes into use is its score on text that was held out nights ago."""
    checkpoint, shards = only(copy, "runs/toy/checkpoints/step_000004"), only(copy, "data/shards/*")
    manifest = json.loads((shards / "manifest.json").read_text())
    hold_out = {"name": "night-1", "shards": {manifest["fingerprint"]: str(shards)}}
    arm = {"key": "scratch", "config": str(checkpoint / "config.yaml"), "shards": str(shards)}
    plan = {"champion": {"key": "toy", "checkpoint": str(checkpoint)}, "judge": None, "models": [], "arms": [arm]}
    plan |= {"holdouts": [hold_out], "scores": str(tmp_path / "scores")}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    flip(only(copy, "data/tokens/*/val_000000.bin"), 0.5)
    words = ("gptcore.nights", tmp_path / "plan.json", "--out", tmp_path / "night", "--run", "night")
    assert "val_000000.bin: content differs" in refusal(copy, *words)
    assert not list(tmp_path.glob("scores/**/*.npz"))


def test_no_alias_moves_to_flipped_weights(copy: Path, mlflow_store: str) -> None:
    """promote looked for a marker; the model in use answered nonsense from then on."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=mlflow_store)
    whole = only(copy, "runs/toy/checkpoints/step_000004")
    client.create_registered_model("toy")
    experiment = client.create_experiment("toy", artifact_location=(copy / "artifacts").as_uri())
    for number in ("1", "2"):
        checkpoint = shutil.copytree(whole, copy / "models" / number / whole.name)
        run = client.create_run(experiment, run_name=f"toy-{number}").info.run_id
        tags = {"gptloom.checkpoint": str(checkpoint), "gptloom.val_bpb": "3.0", "gptloom.run": f"toy-{number}"}
        client.create_model_version("toy", checkpoint.as_uri(), run, tags=tags)
    client.set_registered_model_tag("toy", "gptloom.champions", '["1", "2"]')
    client.set_registered_model_alias("toy", "champion", "2")
    champions = client.get_registered_model("toy").aliases
    for number in ("1", "2"):
        flip(copy / "models" / number / whole.name / "model.safetensors", 0.9)
    assert "model.safetensors" in refusal(copy, "gptloom", "promote", "toy/1")
    assert client.get_registered_model("toy").aliases == champions

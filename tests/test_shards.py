"""Shards: the bytes on disk, what opening them refuses, and the whole way from any text to two splits."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptcore import shards
from gptcore.config import ExperimentConfig, UserError, check_config
from gptcore.corpus import read_records
from gptcore.shards import ShardSet, ShardWriter, TokenView, map_shard, prepare, write_shards
from gptcore.store import read_manifest
from gptcore.vocab import Vocab

FINGERPRINT = "0123456789abcdef" * 4


def text_of_lines(seed: int, n_bytes: int) -> str:
    rng = random.Random(seed)
    return "".join(
        "".join(rng.choices("abcdefgh ", k=60)) + rng.choice(("\n", "\n", "\n\n")) for _ in range(n_bytes // 61)
    )


def config(source: Path, block_size: int = 64, **data: object) -> ExperimentConfig:
    return check_config({"data": {"source": str(source), **data}, "model": {"block_size": block_size}})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> shards.Prepared:
    """Three documents of 20 kB as corpus, vocabulary and shards; tests must not change them."""
    root = tmp_path_factory.mktemp("made")
    (root / "texts").mkdir()
    for number in range(3):
        (root / "texts" / f"{number}.txt").write_text(text_of_lines(number, 20_000) + "é", encoding="utf-8")
    return prepare(config(root / "texts", val_fraction=0.2), root)


@pytest.fixture
def copied(made: shards.Prepared, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.shards, tmp_path / "copy"))


def test_header_is_llm_c(made: shards.Prepared) -> None:
    """Guards compatibility: magic, version and count where llm.c reads them, ids right after 1,024 bytes."""
    raw = (made.shards / "val_000000.bin").read_bytes()
    header = np.frombuffer(raw[:1024], dtype="<i4")
    shard_set = ShardSet.open(made.shards)
    assert header[:3].tolist() == [20240520, 1, shard_set.n_tokens["val"]]
    assert header[3:11].tobytes().hex() == shard_set.fingerprint == Vocab.load(made.shards).fingerprint
    assert not header[11:].any()
    assert np.frombuffer(raw[1024:], dtype="<u2").tolist() == np.asarray(shard_set.tokens("val")).tolist()


@pytest.mark.parametrize("split", ["train", "val"])
def test_tokens_are_the_records_each_behind_an_end_of_text(made: shards.Prepared, split: str) -> None:
    """Guards the whole chain: decoding the shards gives the corpus back; the index points at its records."""
    shard_set, vocab = ShardSet.open(made.shards), Vocab.load(made.shards)
    records = list(read_records(made.corpus, split))
    tokens, index = np.asarray(shard_set.tokens(split)), shard_set.index(split)
    assert vocab.decode(tokens) == "".join(record.text for record in records)
    assert index[:, 0].tolist() == np.flatnonzero(tokens == shard_set.eot_id).tolist()
    assert index[:, 1].tolist() == [record.document for record in records]
    assert index[:, 2].sum() == shard_set.n_bytes[split] == sum(len(record.text.encode()) for record in records)
    assert shard_set.token_bytes.shape == (shard_set.vocab_size,)
    unknown = shard_set.manifest["n_unknown"][split]
    assert unknown or shard_set.token_bytes[tokens].sum() == shard_set.n_bytes[split]


def test_maps_are_read_only(made: shards.Prepared) -> None:
    tokens = ShardSet.open(made.shards).tokens("train")
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1  # type: ignore[index]


def test_second_call_reuses(made: shards.Prepared, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    home = made.shards.parents[2]
    assert write_shards(made.corpus, made.vocab, home, 64) == made.shards
    assert f"shards {made.shards.name}: reused" in caplog.text
    with pytest.raises(UserError, match=r"model\.block_size"):  # also where the shards are there already
        write_shards(made.corpus, made.vocab, home, 1 << 20)


def test_writer_refuses_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    """Guards against uint16 that wraps: 65,536 would silently become 0."""
    writer = ShardWriter(tmp_path, "train", 1 << 16, FINGERPRINT)
    for bad in ([1 << 16], [-1]):
        with pytest.raises(AssertionError):
            writer.append(np.array(bad))
    writer.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("vocab_size", "magic"), [(1 << 16, 20240520), ((1 << 16) + 1, 20240801)])
def test_large_vocabularies_take_four_bytes(tmp_path: Path, vocab_size: int, magic: int) -> None:
    writer = ShardWriter(tmp_path, "train", vocab_size, FINGERPRINT)
    ids = np.array([0, vocab_size - 1, 7])
    writer.append(ids)
    writer.close()
    assert np.fromfile(tmp_path / "train_000000.bin", dtype="<i4", count=1)[0] == magic
    assert map_shard(tmp_path / "train_000000.bin", FINGERPRINT).tolist() == ids.tolist()


def test_several_shards_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the seams: any slice or selection over several files equals that of one array."""
    monkeypatch.setattr(shards, "MAX_SHARD_TOKENS", 100)
    writer = ShardWriter(tmp_path, "val", 1000, FINGERPRINT)
    everything = np.arange(350)
    for piece in np.split(everything, [3, 99, 260]):
        writer.append(piece)
    writer.close()
    assert writer.names == [f"val_{number:06d}.bin" for number in range(4)]
    view = TokenView([map_shard(tmp_path / name, FINGERPRINT) for name in writer.names])
    assert len(view) == 350
    for begin, end in [(0, 350), (95, 205), (340, 400), (-10, 350), (20, 20)]:
        assert view[begin:end].tolist() == everything[begin:end].tolist()
    picks = np.random.default_rng(0).integers(-350, 350, (7, 9))
    assert view[picks].tolist() == everything[picks].tolist()
    assert (view[299], view[-1]) == (299, 349)
    with pytest.raises(IndexError):
        view[np.array([350])]


def test_damaged_shards_are_refused(copied: Path) -> None:
    """Guards against training on half a file or on another vocabulary's ids; each message names the file."""
    path = copied / "train_000000.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=r"train_000000\.bin"):
        ShardSet.open(copied)
    for position, words in [(0, "not a token shard"), (8, "does not fit"), (12, "another vocabulary")]:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(UserError, match=f"train_000000.bin.*{words}"):
            ShardSet.open(copied)


def test_directories_that_are_not_shards_are_refused(copied: Path, made: shards.Prepared, tmp_path: Path) -> None:
    (copied / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        ShardSet.open(copied)
    (copied / "COMMITTED").unlink()
    for directory, words in [
        (copied, "not a committed directory"),
        (tmp_path / "no", "not a committed"),
        (made.corpus, "holds 'corpus'"),
    ]:
        with pytest.raises(UserError, match=words):
            ShardSet.open(directory)


@pytest.mark.parametrize(
    ("block_size", "split", "way_out"), [(5000, "val", "raise data.val_fraction"), (60_000, "train", "lower")]
)
def test_text_too_short_for_the_context(tmp_path: Path, block_size: int, split: str, way_out: str) -> None:
    """Guards "nothing half-written": the check comes before the first shard."""
    source = tmp_path / "a.txt"
    source.write_text(text_of_lines(1, 50_000), encoding="utf-8")
    data = {"split": "tail", "val_fraction": 0.05} if split == "val" else {"split": "tail", "val_fraction": 0.4}
    with pytest.raises(
        UserError,
        match=rf"the {split} split has \d+ tokens, fewer than model.block_size \+ 1 = {block_size + 1}.*{way_out}",
    ):
        prepare(config(source, block_size, **data), tmp_path)
    assert not (tmp_path / "data" / "shards").exists()


def _random_unicode(n_bytes: int) -> str:
    rng = random.Random(5)
    codes = (
        rng.choice((rng.randrange(1, 0x800), rng.randrange(0x800, 0xD800), rng.randrange(0xE000, 0x110000)))
        for _ in range(n_bytes)
    )
    return "".join(map(chr, codes)).encode()[:n_bytes].decode(errors="ignore")


ANY_TEXT = {
    "prose": text_of_lines(3, 50_000),
    "one line": text_of_lines(4, 50_000).replace("\n", " "),
    "one word": "word " * 10_000,
    "one repeated line": "the same line again\n" * 2_500,
    "one repeated paragraph": "the same\nparagraph\n\n" * 2_500,
    "one character": "x" * 50_000,
    "one astral character": "𝄞" * 12_500,
    "blank lines": "\n" * 50_000,
    "spaces": " " * 50_000,
    "CJK": "".join(random.Random(6).choices([chr(code) for code in range(0x4E00, 0x5E00)], k=16_700)),
    "emoji": "".join(random.Random(7).choices("😀😁😂🤣😃", k=12_500)),
    "random unicode": _random_unicode(50_000),
    "more characters than two bytes hold": "".join(
        chr(code) for code in range(1, 0x110000, 15) if not 0xD800 <= code < 0xE000
    ),
    "carriage returns": "one line\rand one more\r" * 2_300,
    "windows": "one line\r\nand one more\r\n\r\n" * 2_300,
    "four huge lines": "".join(letter * 12_500 + "\n" for letter in "abcd"),
    "one huge paragraph, then crumbs": "z" * 49_000 + "".join(f"\n\n{number}" for number in range(300)),
}


@pytest.mark.parametrize("name", ANY_TEXT)
def test_any_text_of_50_kb_gives_two_usable_splits(tmp_path: Path, name: str) -> None:
    """Guards `gptloom run experiments/smoke.yaml data.source=FILE` for whatever the file holds (context 64)."""
    (tmp_path / "a.txt").write_bytes(ANY_TEXT[name].encode())
    prepared = prepare(config(tmp_path / "a.txt"), tmp_path)
    shard_set, vocab = ShardSet.open(prepared.shards), Vocab.load(prepared.shards)
    assert min(shard_set.n_tokens.values()) > 4 * 64
    assert max(int(np.asarray(shard_set.tokens(split)).max()) for split in ("train", "val")) < vocab.size
    records = {split: {record.text for record in read_records(prepared.corpus, split)} for split in ("train", "val")}
    assert read_manifest(prepared.corpus)["split"] == "tail" or not records["train"] & records["val"]


def test_opening_needs_numpy_only(made: shards.Prepared) -> None:
    """Guards training on a bare machine: no pyarrow, pandas, tokenizers or package index behind `gptcore.train`."""
    program = (
        "import sys\n"
        "for name in ('pyarrow', 'pandas', 'tokenizers', 'pypi_simple', 'requests', 'torch'): sys.modules[name] = None\n"
        "from gptcore.shards import ShardSet\nfrom gptcore.batches import BatchSampler\nfrom gptcore.vocab import Vocab\n"
        f"shards = ShardSet.open({str(made.shards)!r})\n"
        "print(BatchSampler(shards.tokens('train'), 64, 1).batch(0, 2)[0].shape, Vocab.load(shards.directory).size)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(2, 64)")

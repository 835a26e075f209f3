"""Shards: the bytes on disk, what opening them refuses, and the whole way from any text to two splits."""

from __future__ import annotations

import errno
import hashlib
import json
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptcore import shards
from gptcore.config import ExperimentConfig, UserError, VocabConfig, check_config
from gptcore.corpus import read_records, records, segments
from gptcore.corpus.chunks import list_chunks
from gptcore.parallel import map_processes
from gptcore.shards import ShardSet, ShardWriter, TokenView, format, map_shard, prepare, write_shards
from gptcore.shards.encoding import _behind_ends
from gptcore.store import MANIFEST, MARKER, read_manifest, write_json
from gptcore.vocab import Vocab

FINGERPRINT = "0123456789abcdef" * 4


def text_of_lines(seed: int, n_bytes: int) -> str:
    rng = random.Random(seed)
    return "".join("".join(rng.choices("abcdefgh ", k=60)) + rng.choice(("\n", "\n", "\n\n")) for _ in range(n_bytes // 61))


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
    """The shard set in a copy of the whole data folder, which also shows that it may be moved."""
    data = shutil.copytree(made.shards.parents[1], tmp_path / "copy")
    return Path(data) / "shards" / made.shards.name


def only_tokens(shard_dir: Path) -> Path:
    """The directory of ids of a shard set of one segment."""
    (directory,) = ShardSet.open(shard_dir).token_dirs
    return directory


def test_header_is_llm_c(made: shards.Prepared) -> None:
    """Guards compatibility: magic, version and count where llm.c reads them, ids right after 1,024 bytes."""
    raw = (only_tokens(made.shards) / "val_000000.bin").read_bytes()
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


def read_as_llm_c(path: Path) -> list[int]:
    """A data shard by the description in llm.c's README and dev/data/data_common.py, and by nothing of ours.

    256 int32: [0] magic 20240520, [1] version 1, [2] number of tokens, then the tokens as uint16; the Llama 3 variant has
    magic 20240801, version 7 and uint32.
    """
    with open(path, "rb") as file:
        header = struct.unpack("<256i", file.read(1024))
        kind = {(20240520, 1): ("H", 2), (20240801, 7): ("I", 4)}[header[:2]]
        data = file.read()
    assert len(data) == header[2] * kind[1]
    return list(struct.unpack(f"<{header[2]}{kind[0]}", data))


@pytest.mark.parametrize("vocab", [{"kind": "char"}, {"kind": "byte"}, {"kind": "bpe", "size": 300}])
def test_an_independent_reader_gets_the_same_ids(made: shards.Prepared, tmp_path: Path, vocab: dict[str, object]) -> None:
    """Guards the format for everybody else, and each kind of vocabulary from text to shards and back."""
    source = made.shards.parents[2] / "texts"
    prepared = prepare(config(source, val_fraction=0.2).model_copy(update={"vocab": VocabConfig(**vocab)}), tmp_path)  # type: ignore[arg-type]
    shard_set, opened = ShardSet.open(prepared.shards), Vocab.load(prepared.shards)
    for split in ("train", "val"):
        theirs = [i for path in sorted(only_tokens(prepared.shards).glob(f"{split}_*.bin")) for i in read_as_llm_c(path)]
        assert theirs == np.asarray(shard_set.tokens(split)).tolist()
        assert opened.decode(theirs) == "".join(record.text for record in read_records(prepared.corpus, split))
        assert shard_set.token_bytes[theirs].sum() == shard_set.n_bytes[split]


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
    monkeypatch.setattr(format, "MAX_SHARD_TOKENS", 100)
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
    path = only_tokens(copied) / "train_000000.bin"
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
    with pytest.raises(UserError, match=r"manifest\.json: missing or damaged"):
        ShardSet.open(copied)
    (copied / "COMMITTED").unlink()
    for directory, words in [
        (copied, "not a committed directory"),
        (tmp_path / "no", "no such directory; correct the path"),
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
        UserError, match=rf"the {split} split has \d+ tokens, fewer than model.block_size \+ 1 = {block_size + 1}.*{way_out}"
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
    "more characters than two bytes hold": "".join(chr(code) for code in range(1, 0x110000, 15) if not 0xD800 <= code < 0xE000),
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
        "for name in ('pyarrow', 'pandas', 'tokenizers', 'fastokens', 'gigatoken', 'tqdm', 'pypi_simple', 'requests', 'torch'): sys.modules[name] = None\n"
        "from gptcore.shards import ShardSet\nfrom gptcore.batches import BatchSampler\nfrom gptcore.vocab import Vocab\n"
        f"shards = ShardSet.open({str(made.shards)!r})\n"
        "print(BatchSampler(shards.tokens('train'), 64, 1).batch(0, 2)[0].shape, Vocab.load(shards.directory).size)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(2, 64)")


# --- growing, and who works -----------------------------------------------------------------------------------------------


def file_states(root: Path) -> dict[str, tuple[int, str]]:
    """Modification time and sha256 of every file of the committed directories in home/data."""
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for kind in ("segments", "corpora", "vocabs", "tokens", "shards")
        for path in (root / kind).rglob("*")
        if path.is_file()
    }


def test_one_more_document_makes_one_small_segment(tmp_path: Path) -> None:
    """Guards incremental growth: with the vocabulary frozen, nothing that is there is written again, and no document moves."""
    texts, home = tmp_path / "texts", tmp_path / "home"
    texts.mkdir()
    for number in range(1000):
        (texts / f"{number:04d}.txt").write_text(f"document {number} " + text_of_lines(number, 300), encoding="utf-8")
    first = prepare(config(texts, block_size=16), home)
    before = file_states(home / "data")
    old = {split: [r.text for r in read_records(first.corpus, split)] for split in ("train", "val")}

    (texts / "one_more.txt").write_text("document 1000 " + text_of_lines(1000, 300), encoding="utf-8")
    frozen = config(texts, block_size=16).model_copy(update={"vocab": VocabConfig(source=str(first.vocab))})
    second = prepare(frozen, home)

    after = file_states(home / "data")
    assert {name: state for name, state in after.items() if name in before} == before
    old_set, new_set = ShardSet.open(first.shards), ShardSet.open(second.shards)
    assert new_set.token_dirs[0].resolve() == old_set.token_dirs[0].resolve()
    assert len(new_set.token_dirs) == 2
    assert sum(new_set.manifest["n_records"].values()) == 1001
    added = sum(path.stat().st_size for path in new_set.token_dirs[1].rglob("*.bin"))
    assert 0 < added < 3000
    new = {split: [r.text for r in read_records(second.corpus, split)] for split in ("train", "val")}
    assert all(new[split][: len(old[split])] == old[split] for split in old)
    for split in ("train", "val"):
        tokens, index = new_set.tokens(split), new_set.index(split)
        assert Vocab.load(second.shards).decode(tokens[0 : len(tokens)]) == "".join(new[split])
        assert (tokens[index[:, 0]] == new_set.eot_id).all()
        assert len(set(index[:, 1])) == len(index)
    assert new_set.verify() > 0


def test_deleted_ids_are_made_again(tmp_path: Path) -> None:
    """Guards the way out that the messages name: delete the directory and run again."""
    (tmp_path / "a.txt").write_text(text_of_lines(1, 60_000), encoding="utf-8")
    prepared = prepare(config(tmp_path / "a.txt"), tmp_path)
    tokens = only_tokens(prepared.shards)
    before = {path.name: path.read_bytes() for path in tokens.iterdir()}
    shutil.rmtree(tokens)
    with pytest.raises(UserError, match=tokens.name):
        ShardSet.open(prepared.shards)
    assert prepare(config(tmp_path / "a.txt"), tmp_path) == prepared
    assert {path.name: path.read_bytes() for path in tokens.iterdir()} == before
    ShardSet.open(prepared.shards).verify()


@pytest.mark.integration
def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards order: chunks that finish out of turn must be strung together in turn."""
    monkeypatch.setattr(segments, "ROW_GROUP_BYTES", 10_000)
    monkeypatch.setattr(records, "BATCH_BYTES", 5000)
    (tmp_path / "texts").mkdir()
    for number in range(100):
        (tmp_path / "texts" / f"{number}.txt").write_text(text_of_lines(number, 1500), encoding="utf-8")
    prepared = prepare(config(tmp_path / "texts"), tmp_path)
    monkeypatch.setenv("GPTLOOM_WORKERS", "2")
    made = []
    for chunk_map in (map, map_processes):
        shutil.rmtree(tmp_path / "data" / "tokens")
        directory = write_shards(prepared.corpus, prepared.vocab, tmp_path, 64, chunk_map)
        made.append({path.name: path.read_bytes() for path in only_tokens(directory).iterdir()})
    assert len(list_chunks(prepared.corpus)) > 8
    assert made[0] == made[1]


@pytest.mark.parametrize("lengths", [[], [0], [1, 0, 3], [500], [500, 0, 700, 1], [3] * 50])
def test_ends_stand_before_each_record(lengths: list[int]) -> None:
    """Guards both ways of putting `<|endoftext|>` between records, tiny and long."""
    ids = np.arange(sum(lengths)) + 1
    offsets = np.cumsum([0, *lengths])
    expected = [i for a, b in pairwise(offsets) for i in (0, *ids[a:b])]
    assert _behind_ends(ids, offsets, 0, "<u2").tolist() == expected


def test_a_process_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """Guards "no partial output": an error while encoding must not leave a directory that looks whole."""
    (tmp_path / "a.txt").write_text(text_of_lines(1, 60_000), encoding="utf-8")
    prepared = prepare(config(tmp_path / "a.txt"), tmp_path)
    shutil.rmtree(tmp_path / "data" / "tokens")
    shutil.rmtree(tmp_path / "data" / "shards")

    def disk_full(function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
        yield function(jobs[0])
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))

    with pytest.raises(OSError, match="No space"):
        write_shards(prepared.corpus, prepared.vocab, tmp_path, 64, disk_full)
    assert not list((tmp_path / "data" / "tokens").iterdir())
    assert not (tmp_path / "data" / "shards").exists()


# --- mixtures -------------------------------------------------------------------------------------------------------------


def test_weighted_sources_are_told_apart(tmp_path: Path) -> None:
    """Guards mixtures: each source's tokens, all of them and no others, with the share of its weight."""
    for name, letter in (("a", "x"), ("b", "y")):
        (tmp_path / name).mkdir()
        for number in range(30):
            (tmp_path / name / f"{number}.txt").write_text(f"{letter}" * (200 + number), encoding="utf-8")
    sources = [{"source": str(tmp_path / "a"), "weight": 3}, {"source": str(tmp_path / "b"), "weight": 1}]
    settings = check_config(
        {"data": {"source": sources, "split": "document", "val_fraction": 0.2}, "model": {"block_size": 16}}
    )
    shard_set = ShardSet.open(prepare(settings, tmp_path / "home").shards)
    vocab, found = Vocab.load(shard_set.directory), shard_set.sources()
    assert [source.weight for source in found] == [0.75, 0.25]
    texts = [vocab.decode(np.asarray(source.tokens[0 : len(source.tokens)])) for source in found]
    assert [set(text) for text in texts] == [{"x"}, {"y"}]
    assert sum(len(source.tokens) for source in found) == shard_set.n_tokens["train"]


def test_one_source_is_no_mixture(made: shards.Prepared) -> None:
    shard_set = ShardSet.open(made.shards)
    (source,) = shard_set.sources()
    assert source.tokens is shard_set.tokens("train")


# --- complete verification ------------------------------------------------------------------------------------------------


def test_verify_reads_everything(made: shards.Prepared) -> None:
    total = sum(path.stat().st_size for d in (made.shards, only_tokens(made.shards)) for path in d.iterdir())
    manifests = sum((d / name).stat().st_size for d in (made.shards, only_tokens(made.shards)) for name in (MANIFEST, MARKER))
    assert ShardSet.open(made.shards).verify() == total - manifests


@pytest.mark.parametrize("name", ["train_000000.bin", "val_000000.bin", "train_index.npy", "val_index.npy"])
def test_a_flipped_bit_is_found(copied: Path, name: str) -> None:
    """Guards what sizes and headers cannot show; the message names the file and the way out."""
    path = only_tokens(copied) / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=rf"{name}: content differs.*delete .* and run again"):
        ShardSet.open(copied).verify()


def forge(shard_dir: Path, name: str, content: bytes) -> None:
    """Change a file of the ids, every manifest with it and what the markers say: what a hash does not show."""
    tokens = only_tokens(shard_dir)
    (tokens / name).write_bytes(content)
    manifest = json.loads((tokens / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_json(tokens / MANIFEST, manifest)
    outer = json.loads((shard_dir / MANIFEST).read_text(encoding="utf-8"))
    outer["tokens"][0]["manifest_sha256"] = hashlib.sha256((tokens / MANIFEST).read_bytes()).hexdigest()
    write_json(shard_dir / MANIFEST, outer)
    for directory in (tokens, shard_dir):
        (directory / MARKER).write_bytes(b"")


@pytest.mark.parametrize(
    ("position", "value", "words"), [(1026, 60_000, "no id of its vocabulary"), (1026, 0, "not where its index says")]
)
def test_verify_looks_at_the_ids_too(copied: Path, position: int, value: int, words: str) -> None:
    """Guards against a writer's bug: ids out of range, or an end of text where no record begins."""
    raw = bytearray((only_tokens(copied) / "train_000000.bin").read_bytes())
    raw[position : position + 2] = value.to_bytes(2, "little")
    forge(copied, "train_000000.bin", bytes(raw))
    with pytest.raises(UserError, match=words):
        ShardSet.open(copied).verify()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a token shard"),
        (b"\0" * 1023, "not a token shard"),
        (b"\0" * 1024, "not a token shard"),
        (struct.pack("<3i", 20240520, 2, 0) + bytes(1012), "not a token shard"),
        (struct.pack("<3i", 20240520, 1, 5) + bytes(1012), "does not fit the 5 tokens"),
        (struct.pack("<3i", 20240520, 1, -1) + bytes(1012), "does not fit"),
        (struct.pack("<3i", 20240520, 1, 0) + bytes(1012), "another vocabulary"),
    ],
)
def test_hostile_shards_are_refused(copied: Path, content: bytes, words: str) -> None:
    """Guards the checks of the header themselves, with manifests that agree with the file."""
    forge(copied, "train_000000.bin", content)
    with pytest.raises(UserError, match=rf"train_000000\.bin.*{words}"):
        ShardSet.open(copied)


def test_ids_of_another_run_are_refused(copied: Path) -> None:
    """Guards the string of directories: one that was exchanged for another, whole in itself, is none of ours."""
    tokens = only_tokens(copied)
    manifest = json.loads((tokens / MANIFEST).read_text(encoding="utf-8"))
    write_json(tokens / MANIFEST, manifest | {"segment": "another"})
    (tokens / MARKER).write_bytes(b"")
    with pytest.raises(UserError, match=r"not the one .* was made with"):
        ShardSet.open(copied)


@pytest.mark.parametrize("where", ["shards", "tokens"])
def test_another_version_is_refused(copied: Path, where: str) -> None:
    directory = copied if where == "shards" else only_tokens(copied)
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    write_json(directory / MANIFEST, manifest | {"format": 1})
    (directory / MARKER).write_bytes(b"")
    with pytest.raises(UserError, match="format 1"):
        ShardSet.open(copied)


@pytest.mark.parametrize("name", ["train_000000.bin", "val_index.npy", "COMMITTED", "manifest.json"])
def test_missing_files_are_named(copied: Path, name: str) -> None:
    (only_tokens(copied) / name).unlink()
    with pytest.raises(UserError, match=f"{name}|not a committed directory|damaged"):
        ShardSet.open(copied)

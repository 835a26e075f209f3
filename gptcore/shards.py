"""Room 3, shards: token ids on disk, memory-mapped, in files that describe themselves.

    python -m gptcore.shards experiments/shakespeare.yaml [section.field=value …]      # corpus, vocabulary and shards

A shard is llm.c's format: 256 little-endian int32, then the ids. Header: magic 20240520 and version 1 for uint16 ids, or
20240801 and 7 for uint32; the token count; then, ours, the vocabulary's fingerprint in ints 3 to 10. Before each record
stands `<|endoftext|>`, which counts zero bytes. `home/data/shards/<id>/` holds

    train_000000.bin … val_000000.bin …      the ids; the shards of a split, one after the other, are its tokens
    train_index.npy, val_index.npy           int64 (records, 3): first token, document number, bytes of text
    token_bytes.npy, tokenizer.json          bytes per id (V,); the vocabulary

Writing reads Parquet (pyarrow); opening needs NumPy only.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptcore import corpus, vocab
from gptcore.config import ExperimentConfig, UserError, load_config
from gptcore.store import commit_dir, content_id, home_dir, is_committed, read_manifest

logger = logging.getLogger(__name__)

FORMAT = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
FINGERPRINT = slice(3, 11)  # where in the header
KINDS = {"<u2": (20240520, 1), "<u4": (20240801, 7)}  # NumPy dtype of the ids → magic, version
MAX_SHARD_TOKENS = 100_000_000
REMAKE = "delete its directory and run again to remake it"


@dataclass(frozen=True)
class Prepared:
    """Three committed directories: what a training run reads, and what that was made from."""

    corpus: Path
    vocab: Path
    shards: Path


class TokenView:
    """Several token arrays read as one (n,) array: length, slices, integer arrays. Slices and selections are copies."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        assert len({part.dtype for part in parts}) == 1, "parts must exist and share a dtype"
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in parts])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            assert step == 1, "only slices without a step"
            begins = self.ends - [len(part) for part in self.parts]
            pieces = [
                part[max(start - begin, 0) : max(stop - begin, 0)]
                for part, begin in zip(self.parts, begins, strict=True)
            ]
            return np.concatenate(pieces)
        index = np.asarray(key)
        if index.size and (index.min() < -len(self) or index.max() >= len(self)):
            raise IndexError(f"token index outside 0 … {len(self) - 1}")
        index = np.where(index < 0, index + len(self), index)
        which = np.searchsorted(self.ends, index, side="right")
        result = np.empty(index.shape, dtype=self.dtype)
        for number, part in enumerate(self.parts):
            mask = which == number
            result[mask] = part[index[mask] - (self.ends[number] - len(part))]
        return result[()]


class ShardSet:
    """A committed shard directory, opened read-only. Make one with `ShardSet.open`."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.id: str = manifest["id"]
        self.vocab_size: int = manifest["vocab_size"]
        self.eot_id: int = manifest["eot_id"]
        self.fingerprint: str = manifest["fingerprint"]
        self.n_tokens: dict[str, int] = manifest["n_tokens"]
        self.n_bytes: dict[str, int] = manifest["n_bytes"]
        self.token_bytes: np.ndarray = np.load(directory / "token_bytes.npy", allow_pickle=False)  # (V,)
        self._tokens = {split: self._map_split(split) for split in corpus.SPLITS}

    @classmethod
    def open(cls, directory: str | Path) -> ShardSet:
        """Check the manifest against the files' sizes and every header against the manifest; map, do not read, the ids.

        Raises UserError naming the file that is missing, cut short or of another vocabulary.
        """
        directory = Path(directory)
        try:
            manifest = read_manifest(directory)
            if manifest.get("kind") != "shards":
                raise UserError(
                    f"{directory}: holds {manifest.get('kind')!r}, not shards; give a directory below data/shards"
                )
            if manifest["format"] != FORMAT:
                raise UserError(f"{directory}: format {manifest['format']}, this version reads {FORMAT}; {REMAKE}")
            return cls(directory, manifest)
        except (json.JSONDecodeError, KeyError):
            raise UserError(f"{directory / 'manifest.json'}: damaged; {REMAKE}") from None

    def tokens(self, split: str) -> np.ndarray | TokenView:
        """All ids of a split, (n,) uint16 or uint32: a read-only memory map, or a view over several."""
        return self._tokens[split]

    def index(self, split: str) -> np.ndarray:
        """(records, 3) int64: first token (the record's `<|endoftext|>`), document number, bytes of text."""
        return np.load(self.directory / f"{split}_index.npy", allow_pickle=False)

    def check_fits(self, block_size: int) -> None:
        """Raises UserError if a split does not hold one window of `block_size` + 1 tokens."""
        _require_window(self.n_tokens, block_size)

    def _map_split(self, split: str) -> np.ndarray | TokenView:
        parts = [map_shard(self.directory / name, self.fingerprint) for name in self.manifest["shards"][split]]
        found = sum(len(part) for part in parts)
        if found != self.n_tokens[split]:
            raise UserError(
                f"{self.directory}: {found} {split} tokens in its shards, {self.n_tokens[split]} in its manifest; {REMAKE}"
            )
        return parts[0] if len(parts) == 1 else TokenView(parts)


def map_shard(path: Path, fingerprint: str) -> np.memmap:
    """One shard's ids as a read-only map, after checking magic, version, token count, file size and fingerprint."""
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES), dtype="<i4")
    dtype = {kind: dtype for dtype, kind in KINDS.items()}.get(tuple(header[:2].tolist()))
    if dtype is None or len(header) != HEADER_INTS:
        raise UserError(f"{path}: not a token shard (magic or version unknown); {REMAKE}")
    count = int(header[2])
    if path.stat().st_size != HEADER_BYTES + count * np.dtype(dtype).itemsize:
        raise UserError(f"{path}: its size does not fit the {count} tokens its header states; {REMAKE}")
    if header[FINGERPRINT].tobytes().hex() != fingerprint:
        raise UserError(f"{path}: written with another vocabulary than its manifest says; {REMAKE}")
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,))


class ShardWriter:
    """Streams ids into `directory/<split>_000000.bin` and on, a new file every MAX_SHARD_TOKENS."""

    def __init__(self, directory: Path, split: str, vocab_size: int, fingerprint: str) -> None:
        self.directory, self.split, self.vocab_size, self.fingerprint = directory, split, vocab_size, fingerprint
        self.dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
        self.names: list[str] = []
        self.n_tokens = 0
        self._file: BinaryIO | None = None
        self._room = 0

    def append(self, ids: np.ndarray) -> None:
        # Checked before the cast: a uint16 would wrap without a word, and train to nonsense.
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < self.vocab_size), (
            f"id outside 0 … {self.vocab_size - 1}"
        )
        ids = ids.astype(self.dtype)
        while len(ids):
            if not self._room:
                self._next_file()
            assert self._file is not None
            piece, ids = ids[: self._room], ids[self._room :]
            self._file.write(piece.tobytes())
            self._room -= len(piece)
            self.n_tokens += len(piece)

    def close(self) -> None:
        """Finish the last file's header; also ends the writer after an error."""
        if self._file is not None:
            self._file.seek(0)
            self._file.write(self._header(MAX_SHARD_TOKENS - self._room))
            self._file.close()
            self._file = None

    def _next_file(self) -> None:
        self.close()
        self.names.append(f"{self.split}_{len(self.names):06d}.bin")
        self._file = open(self.directory / self.names[-1], "wb", buffering=1 << 20)  # noqa: SIM115
        self._file.write(bytes(HEADER_BYTES))
        self._room = MAX_SHARD_TOKENS

    def _header(self, count: int) -> bytes:
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = (*KINDS[self.dtype], count)
        header[FINGERPRINT] = np.frombuffer(bytes.fromhex(self.fingerprint), dtype="<i4")
        return header.tobytes()


def locate_shards(corpus_dir: Path, vocab_dir: Path, home: Path) -> Path:
    """The directory of this corpus in this vocabulary, committed yet or not."""
    name = content_id({"format": FORMAT, "corpus": corpus_dir.name, "vocab": vocab_dir.name})
    return home / "data" / "shards" / name


def write_shards(corpus_dir: Path, vocab_dir: Path, home: Path, block_size: int) -> Path:
    """Encode both splits into a committed directory; return it. Early return when it is there.

    Raises UserError, before anything is written, if a split has fewer than `block_size` + 1 tokens: not one window.
    """
    # A character vocabulary has one id per character, and one more before each record.
    sizes = read_manifest(corpus_dir)["splits"]
    _require_window(
        {split: sizes[split]["characters"] + sizes[split]["sections"] for split in corpus.SPLITS}, block_size
    )
    directory = locate_shards(corpus_dir, vocab_dir, home)
    if is_committed(directory):
        logger.info("shards %s: reused", directory.name)
        return directory
    vocabulary = vocab.Vocab.load(vocab_dir)
    manifest: dict[str, Any] = {
        "kind": "shards",
        "id": directory.name,
        "format": FORMAT,
        "corpus": corpus_dir.name,
        "vocab": vocab_dir.name,
        "vocab_size": vocabulary.size,
        "eot_id": vocabulary.eot_id,
        "fingerprint": vocabulary.fingerprint,
        "n_tokens": {},
        "n_bytes": {},
        "n_unknown": {},
        "n_records": {},
        "shards": {},
    }
    with commit_dir(directory, manifest) as tmp:
        for split in corpus.SPLITS:
            for key, value in _write_split(tmp, split, corpus_dir, vocabulary).items():
                manifest[key][split] = value
        np.save(tmp / "token_bytes.npy", vocabulary.token_bytes, allow_pickle=False)
        shutil.copyfile(vocab_dir / vocab.FILE_NAME, tmp / vocab.FILE_NAME)
    for split in corpus.SPLITS:
        n_tokens, n_unknown = manifest["n_tokens"][split], manifest["n_unknown"][split]
        logger.info(
            "shards %s: %d %s tokens in %d files, %d unknown (%.3g %%)",
            directory.name, n_tokens, split, len(manifest["shards"][split]), n_unknown, 100 * n_unknown / n_tokens,
        )  # fmt: skip
    return directory


def prepare(config: ExperimentConfig, home: Path) -> Prepared:
    """Corpus, vocabulary and shards of an experiment, each built or reused.

    Raises UserError for a bad source, or a text too short for the model's context.
    """
    corpus_dir = corpus.build_corpus(config.data, home)
    vocab_dir = vocab.build_vocab(config.vocab, corpus_dir, home)
    return Prepared(corpus_dir, vocab_dir, write_shards(corpus_dir, vocab_dir, home, config.model.block_size))


def main(argv: list[str]) -> dict[str, Any]:
    """`CONFIG.yaml [section.field=value …]` → the three directories and the counts."""
    if not argv or argv[0].startswith("-"):
        raise UserError("usage: python -m gptcore.shards CONFIG.yaml [section.field=value …]")
    prepared = prepare(load_config(argv[0], argv[1:]), home_dir())
    shard_set = ShardSet.open(prepared.shards)
    counts = {key: shard_set.manifest[key] for key in ("vocab_size", "n_tokens", "n_bytes", "n_unknown", "n_records")}
    return {"corpus": str(prepared.corpus), "vocab": str(prepared.vocab), "shards": str(prepared.shards), **counts}


def _require_window(n_tokens: dict[str, int], block_size: int) -> None:
    for split, count in n_tokens.items():
        if count < block_size + 1:
            way_out = "raise data.val_fraction" if split == "val" else "lower data.val_fraction"
            raise UserError(
                f"the {split} split has {count} tokens, fewer than model.block_size + 1 = {block_size + 1}: "
                f"give more text with data.source, lower model.block_size, or {way_out}"
            )


def _write_split(directory: Path, split: str, corpus_dir: Path, vocabulary: vocab.Vocab) -> dict[str, Any]:
    """The shards and the index of one split; its entries of the manifest."""
    writer = ShardWriter(directory, split, vocabulary.size, vocabulary.fingerprint)
    index: list[tuple[int, int, int]] = []
    n_unknown = 0
    try:
        for record in corpus.read_records(corpus_dir, split):
            ids = vocabulary.encode(record.text)
            n_unknown += vocabulary.count_unknown(ids)
            index.append((writer.n_tokens, record.document, record.bytes))
            writer.append(np.concatenate([[vocabulary.eot_id], ids]))
    finally:
        writer.close()
    rows = np.array(index, dtype=np.int64).reshape(-1, 3)
    np.save(directory / f"{split}_index.npy", rows, allow_pickle=False)
    return {
        "n_tokens": writer.n_tokens,
        "n_bytes": int(rows[:, 2].sum()),
        "n_unknown": n_unknown,
        "n_records": len(rows),
        "shards": writer.names,
    }


if __name__ == "__main__":
    from gptcore.entry import run_process

    raise SystemExit(run_process(main))

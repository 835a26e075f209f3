"""A token shard on disk: llm.c's format, written checked and opened checked.

256 little-endian int32, then the ids. Magic 20240520 and version 1 for uint16 ids, 20240801 and 7 for uint32; then the
token count; then, ours, the vocabulary's fingerprint in ints 3 to 10, which llm.c does not look at.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptcore.config import UserError
from gptcore.store import raise_refused

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
FINGERPRINT = slice(3, 11)  # where in the header
KINDS = {"<u2": (20240520, 1), "<u4": (20240801, 7)}  # NumPy dtype of the ids → magic, version
MAX_SHARD_TOKENS = 100_000_000
COPY_BYTES = 1 << 20
REMAKE = "delete its directory and run again to remake it"


def token_dtype(vocab_size: int) -> str:
    """The smallest of the two id types that holds every id."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def map_shard(path: Path, fingerprint: str) -> np.memmap:
    """One shard's ids as a read-only map, after checking magic, version, token count, file size and fingerprint."""
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise_refused(error, path)
        raise UserError(f"{path}: cannot be read ({error.strerror}); {REMAKE}") from None
    header = np.frombuffer(raw[: len(raw) // 4 * 4], dtype="<i4") if raw else np.empty(0, dtype="<i4")
    dtype = {kind: dtype for dtype, kind in KINDS.items()}.get(tuple(header[:2].tolist()))
    if dtype is None or len(header) != HEADER_INTS:
        raise UserError(f"{path}: not a token shard (magic or version unknown); {REMAKE}")
    count = int(header[2])
    if size != HEADER_BYTES + count * np.dtype(dtype).itemsize:
        raise UserError(f"{path}: its size does not fit the {count} tokens its header states; {REMAKE}")
    if header[FINGERPRINT].tobytes().hex() != fingerprint:
        raise UserError(f"{path}: written with another vocabulary than its manifest says; {REMAKE}")
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,))


class ShardWriter:
    """Streams ids into `directory/<split>_000000.bin` and on, a new file every MAX_SHARD_TOKENS."""

    def __init__(self, directory: Path, split: str, vocab_size: int, fingerprint: str) -> None:
        self.directory, self.split, self.vocab_size, self.fingerprint = directory, split, vocab_size, fingerprint
        self.dtype = token_dtype(vocab_size)
        self.names: list[str] = []
        self.n_tokens = 0
        self._file: BinaryIO | None = None
        self._room = 0

    def append(self, ids: np.ndarray) -> None:
        check_range(ids, self.vocab_size)
        self.append_raw(io.BytesIO(ids.astype(self.dtype, copy=False).tobytes()))

    def append_raw(self, source: BinaryIO) -> None:
        """A stream of ids in this writer's `dtype`, which were checked when they were made."""
        size = np.dtype(self.dtype).itemsize
        while block := source.read(min(COPY_BYTES, self._room * size) or size):
            if not self._room:
                self._next_file()
            assert self._file is not None
            assert len(block) % size == 0, "half an id"
            self._file.write(block)
            self._room -= len(block) // size
            self.n_tokens += len(block) // size

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


def check_range(ids: np.ndarray, vocab_size: int) -> None:
    """Before any cast: a uint16 would wrap without a word, and train to nonsense."""
    assert ids.size == 0 or (ids.min() >= 0 and ids.max() < vocab_size), f"id outside 0 … {vocab_size - 1}"


class TokenView:
    """Several token arrays read as one (n,) array: length, slices, integer arrays. Slices and selections are copies."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        assert len({part.dtype for part in parts}) == 1, "parts must exist and share a dtype"
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in parts])
        self.begins = np.concatenate([[0], self.ends[:-1]])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            assert step == 1, "only slices without a step"
            return np.concatenate([*self.cut(start, stop), np.empty(0, dtype=self.dtype)])
        index = np.asarray(key)
        if index.size and (index.min() < -len(self) or index.max() >= len(self)):
            raise IndexError(f"token index outside 0 … {len(self) - 1}")
        index = np.where(index < 0, index + len(self), index)
        which = np.searchsorted(self.ends, index, side="right")
        result = np.empty(index.shape, dtype=self.dtype)
        for number in np.unique(which):
            mask = which == number
            result[mask] = self.parts[number][index[mask] - self.begins[number]]
        return result[()]

    def cut(self, start: int, stop: int) -> list[np.ndarray]:
        """The pieces of `start` … `stop` - 1, still mapped."""
        if stop <= start:
            return []
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        return [
            self.parts[number][max(start - self.begins[number], 0) : stop - self.begins[number]]
            for number in range(first, last + 1)
        ]

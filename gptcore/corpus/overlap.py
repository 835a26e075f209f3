"""How much of one text stands in another: shared 48-byte sequences, sampled by content.

A sequence is looked at where its first eight bytes have a certain hash (about one place in 300), so the same passage is
sampled at the same places wherever it stands. Of those, a split keeps the 131,072 with the smallest hashes (bottom-k
sketch; Broder, 1997), so the memory does not grow with the corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

NGRAM_BYTES = 48
SKETCH = 1 << 17
ANCHOR = 0x9B
BLOCK = 1 << 17
# Fixed for ever: sketches of different years are compared.
NOISE = [hashlib.sha256(bytes([i])).digest() for i in range(256)]
SHUFFLE = bytes(sorted(range(256), key=NOISE.__getitem__))
MULTIPLIERS = [np.uint64(int.from_bytes(NOISE[i][:8], "little") | 1) for i in range(2 * (NGRAM_BYTES // 8))]


def sample_ngrams(utf8: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the sampled sequences and the records they stand in.

    Args:
        utf8: (n,) uint8, the records one after the other.
        ends: (records,) int64, where each record ends; no sequence crosses that.

    Returns:
        (k,) uint64 hashes and (k,) int64 record numbers, in order.
    """
    if len(utf8) < NGRAM_BYTES:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    found = []
    for start in range(0, len(utf8) - NGRAM_BYTES + 1, BLOCK):  # small enough for the cache: twice as fast
        block = utf8[start : start + BLOCK + 7]
        noise = np.frombuffer(block.tobytes().translate(SHUFFLE), dtype=np.uint8)
        pairs = noise[:-1] + noise[1:]
        fours = pairs[:-2] ^ pairs[2:]
        found.append(np.flatnonzero(fours[:-4] + fours[4:] == ANCHOR) + start)
    at = np.concatenate(found)
    at = at[at <= len(utf8) - NGRAM_BYTES]
    record = np.searchsorted(ends, at, side="right")
    inside = at + NGRAM_BYTES <= ends[record]
    at, record = at[inside], record[inside]
    windows = np.lib.stride_tricks.sliding_window_view(utf8, NGRAM_BYTES)[at]
    words = np.ascontiguousarray(windows).view("<u8")  # (k, 6)
    hashes = np.zeros(len(at), dtype=np.uint64)
    for i in range(words.shape[1]):
        hashes += _mix(words[:, i] * MULTIPLIERS[2 * i]) * MULTIPLIERS[2 * i + 1]
    return _mix(hashes), record


class NgramSketch:
    """The smallest distinct hashes seen so far."""

    def __init__(self) -> None:
        self.hashes = np.zeros(0, dtype=np.uint64)
        self._pending: list[np.ndarray] = []
        self._count = 0

    def add(self, hashes: np.ndarray) -> None:
        if len(self.hashes) == SKETCH:
            hashes = hashes[hashes < self.hashes[-1]]
        self._pending.append(hashes)
        self._count += len(hashes)
        if self._count > 2 * SKETCH:
            self.finish()

    def finish(self) -> np.ndarray:
        """(at most SKETCH,) uint64, sorted and distinct."""
        self.hashes = _distinct(np.concatenate([self.hashes, *self._pending]))[:SKETCH]
        self._pending, self._count = [], 0
        return self.hashes


def measure_overlap(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Share (0 to 1) of the distinct sequences of sketches `ours` that `theirs` hold, too; 0 if there are none."""
    full = [sketch[-1] for sketch in (*ours, *theirs) if len(sketch) == SKETCH]
    limit = min(full) if full else np.uint64((1 << 64) - 1)  # below it every sketch is complete
    mine, other = (_distinct(np.concatenate([NgramSketch().hashes, *side])) for side in (ours, theirs))
    mine, other = mine[mine <= limit], other[other <= limit]
    return float(np.isin(mine, other, assume_unique=True).mean()) if len(mine) else 0.0


def _distinct(values: np.ndarray) -> np.ndarray:
    """np.unique, which hashes since NumPy 2.3, is twenty times slower on hashes."""
    values = np.sort(values)
    return values[np.concatenate([[True], values[1:] != values[:-1]])] if len(values) else values


def _mix(values: np.ndarray) -> np.ndarray:
    values = values ^ (values >> np.uint64(29))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    return values ^ (values >> np.uint64(32))

"""A set of 128-bit digests in two NumPy arrays: 24 to 70 bytes a digest, whole batches at a time.

Open addressing with linear probing; the first half of a digest, which is a hash already, picks the slot. A Python set
of 16-byte strings needs about 100 bytes each, and a look-up per document in Python.
"""

from __future__ import annotations

import numpy as np

LOAD = 0.6  # share of slots in use at which the table doubles: from 16 / 0.6 = 27 bytes a digest


class DigestSet:
    """Digests as (n, 2) uint64 rows. A row of zeros would look like an empty slot and is stored as (0, 1)."""

    def __init__(self, capacity: int = 1 << 12) -> None:
        self.size = 0
        self.table = np.zeros((1 << max(capacity - 1, 1).bit_length(), 2), dtype=np.uint64)

    def __len__(self) -> int:
        return self.size

    def find(self, digests: np.ndarray) -> np.ndarray:
        """(n,) int64: the slot of each digest, -1 where it is not in the set. Slots move when digests are added."""
        digests = _without_zeros(digests)
        slots = np.full(len(digests), -1, dtype=np.int64)
        active = np.arange(len(digests))
        at = self._home(digests)
        while len(active):
            rows = self.table[at]
            found = (rows == digests[active]).all(axis=1)
            slots[active[found]] = at[found]
            going = ~found & rows.any(axis=1)
            active, at = active[going], (at[going] + 1) & (len(self.table) - 1)
        return slots

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Add all; (n,) bool: True where a digest was new (at its first place, if it stands in `digests` twice)."""
        digests = _without_zeros(digests)
        while self.size + len(digests) > LOAD * len(self.table):
            self._grow()
        new = np.zeros(len(digests), dtype=bool)
        _, first = np.unique(digests.view("V16").ravel(), return_index=True)
        new[first[self.find(digests[first]) < 0]] = True
        self._insert(digests[new])
        return new

    def _grow(self) -> None:
        old = self.table[self.table.any(axis=1)]
        self.table = np.zeros((2 * len(self.table), 2), dtype=np.uint64)
        self.size = 0
        self._insert(old)

    def _insert(self, digests: np.ndarray) -> None:
        """Digests that are distinct and not in the table; where several want a slot, one wins and the rest go on."""
        self.size += len(digests)
        at = self._home(digests)
        while len(digests):
            free = ~self.table[at].any(axis=1)
            self.table[at[free]] = digests[free]
            waiting = ~(self.table[at] == digests).all(axis=1)
            digests, at = digests[waiting], (at[waiting] + 1) & (len(self.table) - 1)

    def _home(self, digests: np.ndarray) -> np.ndarray:
        return (digests[:, 0] & np.uint64(len(self.table) - 1)).astype(np.int64)


def _without_zeros(digests: np.ndarray) -> np.ndarray:
    digests = np.ascontiguousarray(digests, dtype=np.uint64).reshape(-1, 2)
    zero = ~digests.any(axis=1)
    if zero.any():
        digests = digests.copy()
        digests[zero, 1] = 1
    return digests

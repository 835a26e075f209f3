"""How a corpus is divided into training and validation text, by content so that adding text moves nothing.

`document`: a document's hash decides. `section`: documents are cut into sections of about `section_bytes` at places
their content picks, and a section's hash decides, so no document is all on one side and equal sections share one.
`tail`: the last bytes, as nanoGPT does. Content-defined cutting is LBFS's idea (Muthitacharoen et al., 2001), here
with paragraphs in place of a rolling window.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
HASH_RANGE = 1 << 64
NO_KEYS = np.zeros(0, dtype=np.uint64)


@dataclass(frozen=True)
class SplitPlan:
    """Which records are validation text. A record's key is 64 bits of its content (`hash_document`, `section_key`).

    By hash, keys below `val_fraction` of their range are; the exceptions, sorted, are what a small corpus needs to get
    its share, and stay with a corpus that grows. By tail, everything from byte `cut` on is.
    """

    rule: str  # "document", "section" or "tail"
    selection: str  # "threshold", "smallest" (with exceptions), "tail"
    val_fraction: float
    val_keys: np.ndarray = field(default_factory=lambda: NO_KEYS)  # (n,) uint64, validation though above the threshold
    train_keys: np.ndarray = field(default_factory=lambda: NO_KEYS)  # (n,) uint64, training though below
    cut: int = 0

    def as_json(self) -> dict[str, Any]:
        """The plan as a manifest has it; `restore` is the inverse."""
        sides = {"val": self.val_keys, "train": self.train_keys}
        exceptions = {side: [f"{int(key):016x}" for key in keys] for side, keys in sides.items()}
        plan = {"split": self.rule, "selection": self.selection, "val_fraction": self.val_fraction}
        return plan | {"split_exceptions": exceptions}

    @classmethod
    def restore(cls, manifest: dict[str, Any]) -> SplitPlan:
        written = manifest["split_exceptions"]
        val, train = (np.array([int(key, 16) for key in written[side]], dtype=np.uint64) for side in ("val", "train"))
        return cls(manifest["split"], manifest["selection"], manifest["val_fraction"], val, train)

    def is_val(self, keys: np.ndarray) -> np.ndarray:
        """(n,) bool for (n,) uint64 keys; not for a tail split, whose keys say nothing."""
        assert self.rule != "tail"
        val = keys < np.uint64(int(self.val_fraction * HASH_RANGE))
        if len(self.val_keys):
            val |= np.isin(keys, self.val_keys)
        if len(self.train_keys):
            val &= ~np.isin(keys, self.train_keys)
        return val


def is_balanced(val_bytes: int, total_bytes: int, val_fraction: float) -> bool:
    """Has each side at least half of its share?"""
    return total_bytes * val_fraction / 2 <= val_bytes <= total_bytes * (1 + val_fraction) / 2 and val_bytes > 0


def plan_hash_split(start: SplitPlan, keys: np.ndarray, sizes: np.ndarray) -> SplitPlan | None:
    """`start` itself if it gives both sides their share of these records, else one that takes the smallest hashes.

    As chance has it, the threshold may give a small corpus no validation text, or too much: then the smallest keys are
    taken until validation has half of its share. None if even that is impossible: too few distinct records.

    Args:
        start: The threshold plan, with exceptions where an earlier corpus had them.
        keys, sizes: (n,) uint64 keys and int64 bytes of all records; equal keys go together.
    """
    total = int(sizes.sum())
    if is_balanced(int(sizes[start.is_val(keys)].sum()), total, start.val_fraction):
        return start
    distinct, inverse = np.unique(keys, return_inverse=True)
    size_of = np.bincount(inverse, weights=sizes).astype(np.int64)
    least, most = total * start.val_fraction / 2, total * (1 + start.val_fraction) / 2
    chosen, size = np.zeros(len(distinct), dtype=bool), 0
    for number in range(len(distinct)):
        if size >= least:
            break
        if size + size_of[number] <= most:
            chosen[number] = True
            size += int(size_of[number])
    if size < least or size == 0:
        return None
    below = SplitPlan(start.rule, "threshold", start.val_fraction).is_val(distinct)
    return SplitPlan(start.rule, "smallest", start.val_fraction, distinct[chosen & ~below], distinct[below & ~chosen])


def plan_tail_split(total_bytes: int, val_fraction: float) -> SplitPlan | None:
    """The last `val_fraction` of the bytes; None if the text is too short for two sides."""
    cut = int(total_bytes * (1 - val_fraction))
    if not 4 <= cut <= total_bytes - 4:  # the longest UTF-8 character has 4 bytes
        return None
    return SplitPlan("tail", "tail", val_fraction, cut=cut)


def hash_document(utf8: bytes) -> tuple[bytes, int]:
    """(16 bytes that stand for the document, its 64-bit key).

    The key is the hash of the text without the white space around it, so copies that differ in that are on one side.
    """
    stripped = utf8.rstrip()
    state = hashlib.sha256(stripped)
    head = state.digest()
    if len(stripped) < len(utf8):
        state.update(utf8[len(stripped) :])
    key = head if not stripped[:1].isspace() else hashlib.sha256(stripped.lstrip()).digest()
    return state.digest()[:16], int.from_bytes(key[:8], "big")


def section_key(section: bytes) -> int:
    """The 64 bits that decide a section's side: those of its distinct lines, without the white space around them.

    So sections that differ by a line end, by repetitions or in the order of their lines are on one side.
    """
    lines = b"\n".join(sorted(set(map(bytes.strip, section.splitlines()))))
    return int.from_bytes(hashlib.blake2b(lines, digest_size=8, person=b"split").digest(), "big")


def cut_sections(utf8: bytes, mean_bytes: int) -> list[bytes]:
    """Cut a text into sections of `mean_bytes` on average, mostly between a quarter and four times that.

    What is never cut are paragraphs with the blank lines after them, where they are not overlong themselves. A cut is
    made after one whose hash says so, with a chance proportional to its length, so the same text
    is cut at the same places whatever stands before it; only the size limits look back, and that fades at the next cut.
    """
    least, most = mean_bytes // 4, 4 * mean_bytes
    run = mean_bytes - least
    sections: list[bytes] = []
    begin = end = 0  # of the section so far
    ends = [match.end() for match in BLANK_LINES.finditer(utf8)]
    if not ends or ends[-1] < len(utf8):
        ends.append(len(utf8))
    for paragraph_end in ends:
        paragraph = utf8[end:paragraph_end]
        for unit in (paragraph,) if len(paragraph) <= most else _units(paragraph, mean_bytes, most):
            size = len(unit)
            if end - begin + size > most and end > begin:
                sections.append(utf8[begin:end])
                begin = end
            end += size
            # True for one in run / size units, by their content.
            if end - begin >= least and _hash_unit(unit.strip()) * run < size * HASH_RANGE:
                sections.append(utf8[begin:end])
                begin = end
    if end > begin:
        sections.append(utf8[begin:end])
    return sections


def _hash_unit(unit: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(unit, digest_size=8, person=b"cut").digest(), "big")


def _units(paragraph: bytes, mean_bytes: int, most: int) -> Iterator[bytes]:
    """The lines of an overlong paragraph; the pieces of an overlong line."""
    for line in paragraph.splitlines(keepends=True):
        if len(line) <= most:
            yield line
        else:
            yield from _pieces(line, mean_bytes)


def _pieces(line: bytes, size: int) -> Iterator[bytes]:
    start = 0
    while start < len(line):
        end = character_start(line, min(start + size, len(line)))
        yield line[start:end]
        start = end


def character_start(utf8: bytes, position: int) -> int:
    """The last place at or before `position` where a UTF-8 character begins (continuation bytes are 10xxxxxx)."""
    while 0 < position < len(utf8) and utf8[position] & 0xC0 == 0x80:
        position -= 1
    return position

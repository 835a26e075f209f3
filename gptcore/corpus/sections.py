"""How a corpus is divided into training and validation text, by content so that adding text moves nothing.

`document`: a document's hash decides. `section`: documents are cut into sections of about `section_bytes` at places
their content picks, and a section's hash decides, so no document is all on one side and equal sections share one.
`tail`: the last bytes, as nanoGPT does. Content-defined cutting is LBFS's idea (Muthitacharoen et al., 2001), here
with paragraphs in place of a rolling window.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
HASH_RANGE = 1 << 64


@dataclass(frozen=True)
class HashSplit:
    """Records whose hash is in `val_hashes` are validation text."""

    rule: str  # "document" or "section"
    selection: str  # "threshold": hash below val_fraction; "smallest": the smallest hashes, in a small corpus
    val_hashes: frozenset[int]
    section_bytes: int

    def split(self, utf8: bytes, start: int) -> Iterator[tuple[str, bytes]]:
        """The document's records as (split, text) in order; joined they are the document. `start` plays no part."""
        for record in cut_records(self.rule, utf8, self.section_bytes):
            yield "val" if hash_record(record) in self.val_hashes else "train", record


@dataclass(frozen=True)
class TailSplit:
    """Everything from byte `cut` of all documents, one after the other, is validation text."""

    cut: int
    rule: str = "tail"
    selection: str = "tail"

    def split(self, utf8: bytes, start: int) -> Iterator[tuple[str, bytes]]:
        """One record, or two where the cut falls into this document, which begins at byte `start`."""
        cut = _character_start(utf8, min(max(self.cut - start, 0), len(utf8)))
        for split, record in (("train", utf8[:cut]), ("val", utf8[cut:])):
            if record:
                yield split, record


def plan_hash_split(rule: str, texts: Iterable[bytes], val_fraction: float, section_bytes: int) -> HashSplit | None:
    """Which records go to validation: those whose hash is below `val_fraction` of the hash range.

    Where that gives a side less than half of its share, as chance has it in a small corpus, the smallest hashes are
    taken until validation has half of its share. None if even that is impossible: too few distinct records.
    """
    sizes: dict[int, int] = {}
    for utf8 in texts:
        for record in cut_records(rule, utf8, section_bytes):
            key = hash_record(record)
            sizes[key] = sizes.get(key, 0) + len(record)
    total = sum(sizes.values())
    least, most = total * val_fraction / 2, total * (1 + val_fraction) / 2
    chosen = [key for key in sizes if key < val_fraction * HASH_RANGE]
    if least <= sum(sizes[key] for key in chosen) <= most:
        return HashSplit(rule, "threshold", frozenset(chosen), section_bytes)
    chosen, size = [], 0
    for key in sorted(sizes):
        if size >= least:
            break
        if size + sizes[key] <= most:
            chosen.append(key)
            size += sizes[key]
    return HashSplit(rule, "smallest", frozenset(chosen), section_bytes) if size >= least else None


def plan_tail_split(total_bytes: int, val_fraction: float) -> TailSplit | None:
    """The last `val_fraction` of the bytes; None if the text is too short for two sides."""
    cut = int(total_bytes * (1 - val_fraction))
    return TailSplit(cut) if 4 <= cut <= total_bytes - 4 else None  # the longest UTF-8 character has 4 bytes


def cut_records(rule: str, utf8: bytes, section_bytes: int) -> list[bytes]:
    return [utf8] if rule == "document" else cut_sections(utf8, section_bytes)


def hash_record(record: bytes) -> int:
    """64 bits that decide a record's side: those of its distinct lines, without the white space around them.

    So texts that differ by a last line end, by repetitions or in the order of their lines are on one side, too.
    """
    lines = b"\n".join(sorted({line.strip() for line in record.splitlines()}))
    return int.from_bytes(hashlib.blake2b(lines, digest_size=8, person=b"split").digest(), "big")


def cut_sections(utf8: bytes, mean_bytes: int) -> list[bytes]:
    """Cut a text into sections of `mean_bytes` on average, mostly between a quarter and four times that.

    A cut is made after a paragraph whose hash says so, with a chance proportional to its length, so the same text
    is cut at the same places whatever stands before it; only the size limits look back, and that fades at the next cut.
    """
    least, most = mean_bytes // 4, 4 * mean_bytes
    sections: list[bytes] = []
    pending: list[bytes] = []
    size = 0
    for unit in _units(utf8, mean_bytes, most):
        if size + len(unit) > most and pending:
            sections.append(b"".join(pending))
            pending, size = [], 0
        pending.append(unit)
        size += len(unit)
        if size >= least and _ends_section(unit, mean_bytes - least):
            sections.append(b"".join(pending))
            pending, size = [], 0
    if pending:
        sections.append(b"".join(pending))
    return sections


def _ends_section(unit: bytes, run_bytes: int) -> bool:
    """True for one in `run_bytes / len(unit)` units, by their content."""
    digest = hashlib.blake2b(unit.strip(), digest_size=8, person=b"cut").digest()
    return int.from_bytes(digest, "big") * run_bytes < len(unit) * HASH_RANGE


def _units(utf8: bytes, mean_bytes: int, most: int) -> Iterator[bytes]:
    """What is never cut: paragraphs with the blank lines after them; lines of an overlong paragraph; pieces of an overlong line."""
    for paragraph in _paragraphs(utf8):
        if len(paragraph) <= most:
            yield paragraph
            continue
        for line in paragraph.splitlines(keepends=True):
            if len(line) <= most:
                yield line
            else:
                yield from _pieces(line, mean_bytes)


def _paragraphs(utf8: bytes) -> Iterator[bytes]:
    start = 0
    for match in BLANK_LINES.finditer(utf8):
        yield utf8[start : match.end()]
        start = match.end()
    if start < len(utf8):
        yield utf8[start:]


def _pieces(line: bytes, size: int) -> Iterator[bytes]:
    start = 0
    while start < len(line):
        end = _character_start(line, min(start + size, len(line)))
        yield line[start:end]
        start = end


def _character_start(utf8: bytes, position: int) -> int:
    """The last place at or before `position` where a UTF-8 character begins (continuation bytes are 10xxxxxx)."""
    while 0 < position < len(utf8) and utf8[position] & 0xC0 == 0x80:
        position -= 1
    return position

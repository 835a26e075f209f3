"""From files to batches of records: what one process does, alone or as one of several workers.

A batch is an Arrow table of records with a few facts about its documents, so it goes through a pipe without copies.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptcore.config import DataConfig, UserError
from gptcore.corpus import package_index
from gptcore.corpus.cleaning import clean
from gptcore.corpus.containers import DECODING_ERRORS, Kind, UndecodableError, check_expansion, open_members
from gptcore.corpus.formats import PART_BYTES, Raw, read_json_lines, read_member, read_parquet, read_text_part, title_of
from gptcore.corpus.overlap import sample_ngrams
from gptcore.corpus.sections import SplitPlan, cut_sections, hash_document, section_key
from gptcore.corpus.sources import Entry
from gptcore.errors import is_disk_full

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_BYTES = 2 << 20
BATCH_DOCUMENTS = 20_000


@dataclass(frozen=True)
class CleanText:
    """One document after cleaning: where it came from, and its text."""

    file: int
    source: int
    title: str
    utf8: bytes


@dataclass
class Batch:
    """Some documents, one after the other, as records."""

    # A row per record, training records first: text, bytes, characters, key, val (its side), owner (number of its document
    # in the batch), section, ngrams (list), signature (with near-duplicates only).
    table: pa.RecordBatch
    digests: np.ndarray  # (documents, 2) uint64: the first half of a document's sha256
    files: np.ndarray  # (documents,) int32
    sources: np.ndarray  # (documents,) int16
    titles: list[str]
    counts: dict[int, Counter[str]] = field(default_factory=dict)  # per file: how often each rule applied
    bytes_read: int = 0  # of files on disk, for the progress

    def facts(self) -> bytes:
        """All but the table as JSON and raw arrays; `Batch.restore` is its inverse."""
        head = {
            "titles": self.titles,
            "counts": {str(file): dict(counts) for file, counts in self.counts.items()},
            "bytes_read": self.bytes_read,
        }
        text = json.dumps(head).encode()
        arrays = (self.digests.astype("<u8"), self.files.astype("<i4"), self.sources.astype("<i2"))
        return b"".join([len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in arrays)])

    @classmethod
    def restore(cls, table: pa.RecordBatch, facts: bytes) -> Batch:
        length = int.from_bytes(facts[:8], "little")
        head = json.loads(facts[8 : 8 + length])
        n, at = len(head["titles"]), 8 + length
        digests = np.frombuffer(facts, "<u8", 2 * n, at).reshape(n, 2)
        files = np.frombuffer(facts, "<i4", n, at + 16 * n)
        sources = np.frombuffer(facts, "<i2", n, at + 20 * n)
        counts = {int(file): Counter(rules) for file, rules in head["counts"].items()}
        return cls(table, digests, files, sources, head["titles"], counts, head["bytes_read"])


def read_batches_of(unit: list[Entry], data: DataConfig, plan: SplitPlan) -> Iterator[Batch]:
    """One unit of work as batches. Raises UserError for input that the settings do not allow."""
    counts: dict[int, Counter[str]] = {entry.file: Counter() for entry in unit}
    yield from batch_texts(read_texts(unit, data, counts), counts, data, plan, sum(entry.bytes for entry in unit))


def batch_texts(
    texts: Iterable[CleanText], counts: dict[int, Counter[str]], data: DataConfig, plan: SplitPlan, bytes_read: int
) -> Iterator[Batch]:
    """Documents as batches of about 2 MB. The last one has the counts, as they are by then; it may be empty."""
    pending: list[CleanText] = []
    size = 0
    for text in texts:
        pending.append(text)
        size += len(text.utf8)
        if size >= BATCH_BYTES or len(pending) >= BATCH_DOCUMENTS:
            yield make_batch(pending, data, plan)
            pending, size = [], 0
    last = make_batch(pending, data, plan)
    last.counts = {file: rules for file, rules in counts.items() if rules}
    last.bytes_read = bytes_read
    yield last


def read_texts(unit: list[Entry], data: DataConfig, counts: dict[int, Counter[str]]) -> Iterator[CleanText]:
    """Every document of a unit that the rules leave in, in order; `counts[file][rule]` is added to."""
    for entry in unit:
        counted = counts[entry.file]
        for name, title, raw, html in _read_entry(entry, data, counted):
            title, utf8 = clean(name, title, raw, html, data, counted)
            if utf8:
                yield CleanText(entry.file, entry.source, title, utf8)


def _read_entry(entry: Entry, data: DataConfig, counts: Counter[str]) -> Iterator[tuple[str, str, Any, bool]]:
    """(name, title, raw, is HTML?) of everything in a file. A damaged one raises, or is counted and left, by policy."""
    import pyarrow as pa

    try:
        size = entry.bytes
        small = _read_small(entry)
        if small is not None:
            yield entry.name, title_of(entry.name), small, False
            return
        if entry.package:
            package = package_index.PackageSource.parse(entry.package)
            for name, raw in package_index.read_members(Path(entry.path), package):
                yield name, title_of(name), raw, Kind.of(name).inner == "html"
            return
        with open(entry.path, "rb") as file:
            if entry.part is not None:
                for title, part in _read_part(entry, file, data, size):
                    yield entry.name, title, part, False
                return
            total = 0
            for member in open_members(entry.name, file, data, lambda rule: counts.update([rule] if rule else [])):
                for title, item in read_member(member, entry.text_column, data, size):
                    total += len(item) if isinstance(item, bytes) else 0
                    check_expansion(total, size, entry.name, data)
                    yield member.name, title, item, member.format == "html"
    except UserError:
        raise
    except (UndecodableError, pa.ArrowException, *DECODING_ERRORS) as error:
        if isinstance(error, OSError) and error.errno is not None:
            if is_disk_full(error):
                raise
            raise UserError(f"{entry.name}: cannot be read ({error.strerror}); make {entry.path} readable") from None
        if data.invalid_text == "skip":
            counts["damaged"] += 1
            return
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{entry.name}: damaged, cut short, or not what its name says ({reason}); fetch it again, take it away, or set data.invalid_text=skip"
        ) from None


def _read_small(entry: Entry) -> bytes | None:
    """A plain text of one part with three system calls, for most files are that; None: it is something else."""
    kind = Kind.of(entry.name)
    if kind.compressions or kind.inner not in ("", "txt", "md") or entry.package or entry.part is not None:
        return None
    if entry.bytes > PART_BYTES:
        return None
    descriptor = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        raw = os.read(descriptor, entry.bytes + 1)
    finally:
        os.close(descriptor)
    return raw if len(raw) == entry.bytes else None  # another size: the general way, and the check at the end


def _read_part(entry: Entry, file: Any, data: DataConfig, size: int) -> Iterator[Raw]:
    assert entry.part is not None
    inner, title = Kind.of(entry.name).inner, title_of(entry.name)
    if inner == "parquet":
        yield from ((title, raw) for raw in read_parquet(entry.name, file, [entry.part], entry.text_column, data, size))
    elif inner == "jsonl":
        yield from ((title, raw) for raw in read_json_lines(entry.name, file, entry.part, entry.text_column, data))
    else:
        title, text = read_text_part(title, file, entry.part)
        if text or not entry.part:  # a part without a place to cut has become the tail of the one before
            yield title, text


def make_batch(texts: list[CleanText], data: DataConfig, plan: SplitPlan) -> Batch:
    """Cut documents into records by the plan's rule, hash both, and give each record its side.

    A tail split is not made here: whole documents, all on the training side.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    hashed = [hash_document(text.utf8) for text in texts]
    if plan.rule == "section":
        cut = [cut_sections(text.utf8, data.section_bytes) for text in texts]
        records = list(chain.from_iterable(cut))
        per_document = np.fromiter(map(len, cut), dtype=np.int64, count=len(cut))
        keys = np.array([section_key(section) for section in records], dtype=np.uint64)
    else:
        records = [text.utf8 for text in texts]
        per_document = np.ones(len(texts), dtype=np.int64)
        keys = np.array([key for _, key in hashed], dtype=np.uint64)
    owner = np.repeat(np.arange(len(texts)), per_document)
    section = np.arange(len(owner)) - np.repeat(np.cumsum(per_document) - per_document, per_document)
    val = np.zeros(len(keys), dtype=bool) if plan.rule == "tail" else plan.is_val(keys)
    # Each side in one piece: later on a side is a slice, and its text is not copied again.
    order = np.argsort(val, kind="stable")
    ordered = [records[row] for row in order]
    utf8 = b"".join(ordered)
    lengths = np.fromiter(map(len, ordered), dtype=np.int64, count=len(ordered))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    text = pa.LargeStringArray.from_buffers(len(ordered), pa.py_buffer(offsets), pa.py_buffer(utf8))
    hashes, places = sample_ngrams(np.frombuffer(utf8, dtype=np.uint8), offsets[1:])
    starts = np.searchsorted(places, np.arange(len(ordered) + 1)).astype(np.int32)
    columns = {
        "text": text,
        "bytes": pa.array(lengths),
        "characters": pc.utf8_length(text),
        "key": pa.array(keys[order]),
        "val": pa.array(val[order]),
        "owner": pa.array(owner[order].astype(np.int32)),
        "section": pa.array(section[order].astype(np.int32)),
        "ngrams": pa.ListArray.from_arrays(pa.array(starts), pa.array(hashes)),
    }
    if data.near_duplicates != "off":
        from gptcore.corpus.near import SIGNATURE_BYTES, sign_text

        columns["signature"] = pa.array(map(sign_text, ordered), pa.binary(SIGNATURE_BYTES))
    return Batch(
        pa.RecordBatch.from_pydict(columns),
        np.frombuffer(b"".join(digest for digest, _ in hashed), dtype="<u8").reshape(-1, 2),
        np.array([text.file for text in texts], dtype=np.int32),
        np.array([text.source for text in texts], dtype=np.int16),
        [text.title for text in texts],
    )

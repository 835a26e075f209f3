"""One pass over a source: batches in, each document once, every record on its side, counted, and written.

What the pass does depends on the batches' order only, never on how many processes made them. It holds 16-byte digests
of what it has seen (see `digests`), two row groups and a sketch: the memory does not grow with the text.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptcore.config import DataConfig, UserError
from gptcore.corpus.digests import DigestSet
from gptcore.corpus.overlap import NgramSketch, sample_ngrams
from gptcore.corpus.records import Batch
from gptcore.corpus.sections import SplitPlan, character_start
from gptcore.corpus.segments import FORMAT, SPLITS, SegmentWriter, load_arrays
from gptcore.parallel import progress_bar
from gptcore.store import content_id, read_manifest

if TYPE_CHECKING:
    import pyarrow as pa

    from gptcore.corpus.near import NearIndex

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 10.0
LENGTH_BINS = 48  # documents by the power of two of their bytes


@dataclass
class Base:
    """A corpus that this pass adds to: its documents are known, and stay where they are."""

    directory: Path
    manifest: dict[str, Any]
    plan: SplitPlan
    known: DigestSet
    met: np.ndarray  # (slots of known,) bool: the source still holds this document

    @classmethod
    def open(cls, directory: Path) -> Base:
        manifest = read_manifest(directory)
        known = DigestSet(2 * manifest["documents"])
        for digests in load_arrays(directory, "digests"):
            known.add(digests)
        return cls(directory, manifest, SplitPlan.restore(manifest), known, np.zeros(len(known.table), dtype=bool))

    def meet(self, digests: np.ndarray) -> np.ndarray:
        """(n,) bool: which of the documents the corpus has already."""
        slots = self.known.find(digests)
        self.met[slots[slots >= 0]] = True
        return slots >= 0

    @property
    def lost(self) -> int:
        return len(self.known) - int(self.met.sum())


@dataclass
class FileNotes:
    """What the pass found in each file, for the ledger."""

    digests: dict[int, list[np.ndarray]] = field(default_factory=dict)
    rules: dict[int, Counter[str]] = field(default_factory=dict)

    def add(self, batch: Batch) -> None:
        for file, rules in batch.counts.items():
            self.rules.setdefault(file, Counter()).update(rules)
        if len(batch.files):
            changes = (np.flatnonzero(np.diff(batch.files)) + 1).tolist()
            for begin, end in pairwise([0, *changes, len(batch.files)]):
                self.digests.setdefault(int(batch.files[begin]), []).append(batch.digests[begin:end])


class Pass:
    """Takes batches one after the other; `finish` gives the segment's manifest."""

    def __init__(
        self, data: DataConfig, plan: SplitPlan, base: Base | None = None, folder: Path | None = None, collect: bool = False
    ) -> None:
        self.data, self.plan, self.base, self.folder = data, plan, base, folder
        self.writer = SegmentWriter(folder) if folder else None
        self.seen = DigestSet()
        self.notes = FileNotes()
        self.documents = self.bytes = self.near_duplicates = 0
        self.digests: list[np.ndarray] = []
        self.splits = {split: {"bytes": 0, "characters": 0, "sections": 0} for split in SPLITS}
        self.by_source = np.zeros((len(data.sources), 3), dtype=np.int64)  # documents, bytes, validation bytes
        self.lengths = np.zeros(LENGTH_BINS, dtype=np.int64)
        self.sketches = {split: NgramSketch() for split in SPLITS}
        self.signatures: list[bytes] = []
        self.near = _open_near(data, base) if data.near_duplicates != "off" else None
        self.collected: list[tuple[np.ndarray, np.ndarray]] | None = [] if collect else None
        # One hash per kind of fact, so that the id does not depend on where a batch happened to end.
        self._hashes = {kind: hashlib.sha256() for kind in ("documents", "sources", *SPLITS)}

    def run(self, batches: Iterable[Batch], total_bytes: int) -> Pass:
        """All batches of a source whose files have `total_bytes`; logs how it goes. A failure leaves no open file."""
        started = told = time.monotonic()
        done = 0
        try:
            with progress_bar("reading", total_bytes) as progress:
                for batch in batches:
                    self.add(batch)
                    progress.update(batch.bytes_read)
                    done += batch.bytes_read
                    if time.monotonic() - told >= PROGRESS_SECONDS:
                        told = time.monotonic()
                        self._tell(done, total_bytes, told - started)
        except BaseException:
            self.abort()
            raise
        return self

    def _tell(self, done: int, total: int, seconds: float) -> None:
        left = max(total - done, 0) / max(done / seconds, 1)
        logger.info(
            "read %.0f of %.0f MB on disk, %.0f MB of text, %.0f MB/s, about %.0f s left",
            done / 1e6,
            total / 1e6,
            self.bytes / 1e6,
            self.bytes / 1e6 / seconds,
            left,
        )

    def abort(self) -> None:
        if self.writer:
            self.writer.abort()

    def add(self, batch: Batch) -> None:
        import pyarrow as pa

        self.notes.add(batch)
        chosen = self._choose(batch)
        table = _take(batch.table, chosen[batch.table["owner"].to_numpy()])
        if self.plan.rule == "tail":
            table = self._cut_tail(table)
        val = table["val"].to_numpy(zero_copy_only=False)
        if self.near is not None:
            like, val = self._follow(table, val)
            if self.data.near_duplicates == "drop":
                table, val = _take(table, ~like), val[~like]
        if not table.num_rows:
            return
        owner = table["owner"].to_numpy()
        kept, number = np.unique(owner, return_inverse=True)  # documents with a record, and each record's rank among them
        sizes = table["bytes"].to_numpy()
        self._count(table, batch.sources[kept], number, sizes, val)
        self.digests.append(batch.digests[kept])
        self._hashes["documents"].update(batch.digests[kept].astype("<u8").tobytes())
        self._hashes["sources"].update(batch.sources[kept].astype("<i2").tobytes())
        for split, mask in (("train", ~val), ("val", val)):
            rows = np.flatnonzero(mask)
            self._hashes[split].update(np.column_stack([number[rows] + self.documents, sizes[rows]]).astype("<i8").tobytes())
            if self.writer and len(rows):
                # A slice keeps the whole batch in memory, so the smaller side, which waits long for its row group, is copied.
                large = len(rows) == rows[-1] - rows[0] + 1 and 2 * sizes[rows].sum() > sizes.sum()
                part = table.slice(rows[0], len(rows)) if large else table.filter(pa.array(mask))
                self.writer.write(split, self._columns(batch, part, split, number[rows]), int(sizes[rows].sum()))
        self.documents += len(kept)
        self.bytes += int(sizes.sum())
        if self.bytes > self.data.max_total_bytes:
            raise UserError(
                f"data.source: more than data.max_total_bytes={self.data.max_total_bytes} of text; give less, or raise the limit"
            )

    def finish(self) -> dict[str, Any]:
        """The segment's manifest; its files are whole."""
        digests = np.concatenate([np.zeros((0, 2), dtype=np.uint64), *self.digests])
        if self.writer:
            self.writer.close(digests, self.sketches, self.signatures)
        settings = {"rule": self.plan.rule, "val_fraction": self.data.val_fraction}
        settings |= {"section_bytes": self.data.section_bytes} if self.plan.rule == "section" else {}
        records = [state.hexdigest() for state in self._hashes.values()]
        name = content_id({"format": FORMAT, "settings": settings, "records": records})
        manifest: dict[str, Any] = {"kind": "segment", "id": name, "format": FORMAT}
        manifest |= {"documents": self.documents, "bytes": self.bytes, "near_duplicates": self.near_duplicates}
        manifest |= {"split": self.plan.rule, "splits": self.splits, "lengths": self.lengths.tolist()}
        manifest["sections"] = sum(counts["sections"] for counts in self.splits.values())
        names = ("documents", "bytes", "val_bytes")
        return manifest | {"sources": [dict(zip(names, row, strict=True)) for row in self.by_source.tolist()]}

    def _choose(self, batch: Batch) -> np.ndarray:
        """(documents,) bool: neither in the base nor seen before."""
        chosen = np.ones(len(batch.titles), dtype=bool)
        if self.base is not None:
            chosen &= ~self.base.meet(batch.digests)
        if self.data.drop_duplicates:
            places = np.flatnonzero(chosen)
            chosen[places[~self.seen.add(batch.digests[places])]] = False
        return chosen

    def _columns(self, batch: Batch, table: pa.RecordBatch, split: str, number: np.ndarray) -> pa.RecordBatch:
        """Records of one side as the file has them."""
        import pyarrow as pa

        assert self.writer is not None
        owner = table["owner"]
        digests = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), len(batch.titles), [None, pa.py_buffer(batch.digests.astype("<u8").tobytes())]
        )
        columns = {
            "document": pa.array(number + self.documents),
            "section": table["section"],
            "split": pa.array([split]).take(pa.array(np.zeros(len(number), dtype=np.int8))),
            "source": pa.array(batch.sources[owner.to_numpy()].astype(np.int16)),
            "title": pa.array(batch.titles, pa.string()).take(owner),
            "text": table["text"],
            "bytes": table["bytes"],
            "characters": table["characters"].cast(pa.int64()),
            "digest": digests.take(owner),
        }
        schema = self.writer.schema
        return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)

    def _cut_tail(self, table: pa.RecordBatch) -> pa.RecordBatch:
        """Whole documents in, with their sides out; the one that the cut falls into becomes two records."""
        import pyarrow as pa

        ends = self.bytes + np.cumsum(table["bytes"].to_numpy())
        starts = ends - table["bytes"].to_numpy()
        parts = [table]
        for row in np.flatnonzero((starts < self.plan.cut) & (self.plan.cut < ends)).tolist():
            utf8 = table["text"][row].as_py().encode()
            at = character_start(utf8, int(self.plan.cut - starts[row]))
            if 0 < at < len(utf8):
                owner = table["owner"][row].as_py()
                halves = [_row(table.schema, half, owner, number) for number, half in enumerate((utf8[:at], utf8[at:]))]
                parts = [table.slice(0, row), *halves, table.slice(row + 1)]
                starts = np.insert(starts, row + 1, self.plan.cut)
        table = pa.Table.from_batches(parts).combine_chunks().to_batches()[0] if len(parts) > 1 else table
        return table.set_column(table.schema.get_field_index("val"), "val", pa.array(starts >= self.plan.cut))

    def _follow(self, table: pa.RecordBatch, val: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(which records are like an earlier one, every record's side)."""
        assert self.near is not None
        like, val = np.zeros(len(val), dtype=bool), val.copy()
        signatures = table["signature"].to_pylist()
        # A batch has its training records first; the first seen is the first in the source.
        for row in np.lexsort((table["section"].to_numpy(), table["owner"].to_numpy())):
            signature = signatures[row]
            side = self.near.follow(signature, bool(val[row]))
            if side is None:
                self.signatures.append(signature + int(val[row]).to_bytes(4, "little"))
            else:
                like[row], val[row] = True, side
        self.near_duplicates += int(like.sum())
        return like, val

    def _count(
        self, table: pa.RecordBatch, sources: np.ndarray, number: np.ndarray, sizes: np.ndarray, val: np.ndarray
    ) -> None:
        import pyarrow.compute as pc

        characters = table["characters"].to_numpy()
        grams = pc.list_flatten(table["ngrams"]).to_numpy()
        of_val = np.repeat(val, pc.list_value_length(table["ngrams"]).to_numpy())
        for split, mask, gram_mask in (("train", ~val, ~of_val), ("val", val, of_val)):
            counts = self.splits[split]
            counts["bytes"] += int(sizes[mask].sum())
            counts["characters"] += int(characters[mask].sum())
            counts["sections"] += int(mask.sum())
            self.sketches[split].add(grams[gram_mask])
        lengths = np.bincount(number, weights=sizes)
        held = np.bincount(number, weights=sizes * val)
        for column, weights in enumerate((None, lengths, held)):
            self.by_source[:, column] += np.bincount(sources, weights, minlength=len(self.by_source)).astype(np.int64)
        self.lengths += np.bincount(np.log2(lengths).astype(np.int64), minlength=LENGTH_BINS)[:LENGTH_BINS]
        if self.collected is not None:
            self.collected.append((table["key"].to_numpy(), sizes))


def _open_near(data: DataConfig, base: Base | None) -> NearIndex:
    from gptcore.corpus.near import NearIndex

    index = NearIndex(data.near_threshold)
    for rows in load_arrays(base.directory, "signatures") if base else []:
        for row in rows:
            index.follow(row[:-1].astype("<u4").tobytes(), bool(row[-1]))
    return index


def _take(table: pa.RecordBatch, rows: np.ndarray) -> pa.RecordBatch:
    import pyarrow as pa

    return table if rows.all() else table.filter(pa.array(rows))


def _row(schema: pa.Schema, utf8: bytes, owner: int, section: int) -> pa.RecordBatch:
    """One record of its own; its key and signature are not looked at any more."""
    import pyarrow as pa

    grams = sample_ngrams(np.frombuffer(utf8, dtype=np.uint8), np.array([len(utf8)]))[0]
    values = {"text": utf8.decode(), "bytes": len(utf8), "characters": len(utf8.decode()), "key": 0, "val": False}
    values |= {"owner": owner, "section": section, "ngrams": grams.tolist()}
    return pa.RecordBatch.from_pylist([values], schema=schema)

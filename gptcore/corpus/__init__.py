"""Room 1, corpus: a source becomes clean, deduplicated, split documents in one committed directory.

    python -m gptcore.corpus experiments/shakespeare.yaml [section.field=value …]      # prints the manifest

`home/data/corpora/<id>/documents.parquet` has one row per record, in order: document (number of the source document),
section (number within it), split ("train" or "val"), title, text, bytes, sha256 (of the text). Joining a document's
records gives back its text. The id depends on the texts and the split's settings, never on paths.

Importing this package loads no pyarrow and no pandas, because the trainer imports rooms above it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.config import DataConfig, UserError, load_config
from gptcore.corpus.sections import HashSplit, TailSplit, plan_hash_split, plan_tail_split
from gptcore.corpus.sources import normalise_text, read_source
from gptcore.store import commit_dir, content_id, home_dir, is_committed, read_manifest

if TYPE_CHECKING:
    import pandas
    import pyarrow

logger = logging.getLogger(__name__)

FORMAT = 2  # a change of the files, or of what goes into them, makes new ids
FILE_NAME = "documents.parquet"
AUTO_DOCUMENTS = 1000  # from here on data.split=auto holds out whole documents
ROW_GROUP_BYTES = 16 << 20  # text per row group: what writer and reader hold in memory
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Document:
    """One distinct text of the source: UTF-8 without BOM, line ends \\n."""

    number: int
    title: str
    utf8: bytes
    sha256: str
    start: int  # bytes of all documents before this one


@dataclass(frozen=True)
class Record:
    """One row of the corpus: a whole document, or a section of one."""

    document: int
    section: int
    text: str
    bytes: int


class _Documents:
    """The source's distinct documents, as often as asked; the counts belong to the latest full pass."""

    def __init__(self, data: DataConfig, home: Path) -> None:
        self.data, self.home = data, home
        self.hashes: list[str] = []
        self.bytes = self.duplicates = self.skipped = 0

    def __iter__(self) -> Iterator[Document]:
        self.hashes, self.bytes, self.duplicates, self.skipped = [], 0, 0, 0
        seen: set[str] = set()
        for name, raw in read_source(self.data.source, self.home):
            utf8 = normalise_text(name, raw, self.data.invalid_text)
            if not utf8:
                logger.warning("%s: skipped, %s", name, "not UTF-8 text" if raw else "empty")
                self.skipped += 1
                continue
            sha256 = hashlib.sha256(utf8).hexdigest()
            if sha256 in seen:
                self.duplicates += 1
                continue
            seen.add(sha256)
            self.hashes.append(sha256)
            self.bytes += len(utf8)
            yield Document(len(self.hashes) - 1, Path(name).stem, utf8, sha256, self.bytes - len(utf8))
        if not self.hashes:
            raise UserError(
                f"data.source={self.data.source!r}: no text in it ({self.skipped} empty or skipped files); "
                "give a UTF-8 text file or a folder of them with data.source=PATH"
            )


def locate_corpus(data: DataConfig, home: Path) -> Path:
    """The directory this source and these settings belong to, committed yet or not. Reads (or fetches) the source.

    Raises UserError for a source that is missing, empty, unreachable or not text.
    """
    return _locate(_survey(data, home))


def build_corpus(data: DataConfig, home: Path) -> Path:
    """Read, clean, deduplicate and split the source into a committed directory; return it. Early return when it is there.

    Raises UserError as `locate_corpus` does, and for a text that cannot be split.
    """
    documents = _survey(data, home)
    directory = _locate(documents)
    if is_committed(directory):
        logger.info("corpus %s: reused", directory.name)
        return directory
    surveyed = documents.hashes
    plan = _plan_split(documents)
    manifest: dict[str, Any] = {"kind": "corpus", "id": directory.name, "format": FORMAT, "source": data.source}
    with commit_dir(directory, manifest) as tmp:
        splits = _write_parquet(tmp / FILE_NAME, documents, plan)
        if documents.hashes != surveyed:
            raise UserError(f"data.source={data.source!r}: its files changed while they were read; run again")
        manifest |= {
            "documents": len(surveyed),
            "bytes": documents.bytes,
            "duplicates": documents.duplicates,
            "skipped": documents.skipped,
            "sections": sum(counts["sections"] for counts in splits.values()),
            "split": plan.rule,
            "selection": plan.selection,
            "val_fraction": data.val_fraction,
            "section_bytes": data.section_bytes,
            "splits": splits,
        }
    logger.info(
        "corpus %s: %d documents (%d duplicates dropped, %d skipped), split by %s, train %d bytes, val %d bytes",
        directory.name, len(surveyed), documents.duplicates, documents.skipped, plan.rule, splits["train"]["bytes"], splits["val"]["bytes"],
    )  # fmt: skip
    return directory


def read_records(corpus_dir: Path, split: str) -> Iterator[Record]:
    """The records of one split, in document order; memory for one row group."""
    import pyarrow.compute as pc

    assert split in SPLITS, split
    for batch in _read_batches(corpus_dir, ["document", "section", "split", "text", "bytes"]):
        for row in batch.filter(pc.equal(batch["split"], split)).drop_columns(["split"]).to_pylist():
            yield Record(**row)


def read_documents(corpus_dir: Path, split: str) -> Iterator[str]:
    """The texts of one split, in order: whole documents, or the sections of documents that were cut."""
    return (record.text for record in read_records(corpus_dir, split))


def corpus_statistics(corpus_dir: Path) -> pandas.DataFrame:
    """One row per document: title, bytes, characters, sections, val_bytes, val_share (0 to 1); index: document number."""
    import pandas as pd
    import pyarrow.compute as pc

    parts = []
    for batch in _read_batches(corpus_dir, ["document", "title", "split", "text", "bytes"]):
        part = batch.drop_columns(["text"]).to_pandas()
        part["characters"] = pc.utf8_length(batch["text"]).to_numpy(zero_copy_only=False)
        parts.append(part)
    rows = pd.concat(parts)
    rows["val_bytes"] = rows["bytes"].where(rows["split"] == "val", 0)
    table = rows.groupby("document").agg(
        title=("title", "first"),
        bytes=("bytes", "sum"),
        characters=("characters", "sum"),
        sections=("split", "size"),
        val_bytes=("val_bytes", "sum"),
    )
    table["val_share"] = table["val_bytes"] / table["bytes"]
    return table


def main(argv: list[str]) -> dict[str, Any]:
    """`CONFIG.yaml [section.field=value …]` → the corpus manifest."""
    if not argv or argv[0].startswith("-"):
        raise UserError("usage: python -m gptcore.corpus CONFIG.yaml [section.field=value …]")
    return read_manifest(build_corpus(load_config(argv[0], argv[1:]).data, home_dir()))


def _survey(data: DataConfig, home: Path) -> _Documents:
    documents = _Documents(data, home)
    for _ in documents:
        pass
    return documents


def _locate(documents: _Documents) -> Path:
    settings = documents.data.model_dump(include={"split", "val_fraction", "section_bytes"})
    name = content_id({"format": FORMAT, "settings": settings, "documents": documents.hashes})
    return documents.home / "data" / "corpora" / name


def _plan_split(documents: _Documents) -> HashSplit | TailSplit:
    """The first rule that gives both sides their share; an explicit data.split has no second choice."""
    data = documents.data
    rules = [data.split]
    if data.split == "auto":
        rules = ["document", "section", "tail"] if len(documents.hashes) >= AUTO_DOCUMENTS else ["section", "tail"]
    for rule in rules:
        plan: HashSplit | TailSplit | None
        if rule == "tail":
            plan = plan_tail_split(documents.bytes, data.val_fraction)
        else:
            texts = (document.utf8 for document in documents)
            plan = plan_hash_split(rule, texts, data.val_fraction, data.section_bytes)
        if plan is not None:
            if rule == "tail" and data.split == "auto":
                logger.warning(
                    "the text has too few distinct sections to hold some out by content: the last %g of its bytes "
                    "are the validation split, which may repeat the training text", data.val_fraction,
                )  # fmt: skip
            return plan
    raise UserError(
        f"data.split={data.split}: the source has too little distinct text ({len(documents.hashes)} documents, "
        f"{documents.bytes} bytes) for a training and a validation side at data.val_fraction={data.val_fraction:g}; "
        "give more text, " + ("or a larger data.val_fraction" if "tail" in rules else "or use data.split=tail")
    )


def _write_parquet(path: Path, documents: _Documents, plan: HashSplit | TailSplit) -> dict[str, dict[str, int]]:
    """Stream all records into `path`; return bytes, characters and sections per split."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("document", pa.int64()),
            ("section", pa.int32()),
            ("split", pa.string()),
            ("title", pa.string()),
            ("text", pa.large_string()),
            ("bytes", pa.int64()),
            ("sha256", pa.string()),
        ]
    )
    splits = {split: {"bytes": 0, "characters": 0, "sections": 0} for split in SPLITS}
    rows: list[dict[str, Any]] = []
    pending = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for document in documents:
            for section, (split, utf8) in enumerate(plan.split(document.utf8, document.start)):
                text = utf8.decode()
                rows.append(
                    {
                        "document": document.number,
                        "section": section,
                        "split": split,
                        "title": document.title,
                        "text": text,
                        "bytes": len(utf8),
                        "sha256": hashlib.sha256(utf8).hexdigest(),
                    }
                )
                splits[split]["bytes"] += len(utf8)
                splits[split]["characters"] += len(text)
                splits[split]["sections"] += 1
                pending += len(utf8)
                if pending >= ROW_GROUP_BYTES:
                    writer.write_table(pa.Table.from_pylist(rows, schema))
                    rows, pending = [], 0
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))
    return splits


def _read_batches(corpus_dir: Path, columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.parquet as pq

    read_manifest(corpus_dir)  # refuses a directory that is not whole
    with pq.ParquetFile(corpus_dir / FILE_NAME) as file:
        for group in range(file.num_row_groups):
            yield from file.read_row_group(group, columns=columns).to_batches()

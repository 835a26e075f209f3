"""A corpus in chunks: row groups of its segments' Parquet, some 16 MB of text each, that any process can read alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptcore.corpus.segments import FILE_NAME, segment_dirs, split_of
from gptcore.store import read_manifest

BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """One row group, which holds one split only. `bytes` is its text, for progress."""

    segment: str
    group: int
    split: str
    bytes: int


@dataclass(frozen=True)
class Texts:
    """Some records: their texts, and (n,) int64 each: document number in the segment, UTF-8 bytes, source number."""

    texts: list[str]
    documents: np.ndarray
    bytes: np.ndarray
    sources: np.ndarray


def list_chunks(directory: Path) -> list[Chunk]:
    """The chunks of a corpus or of one segment, in order. Raises UserError for a directory that is not whole."""
    import pyarrow.parquet as pq

    chunks = []
    for segment in segment_dirs(directory):
        with pq.ParquetFile(segment / FILE_NAME) as file:
            text = file.schema_arrow.names.index("text")
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).column(text).total_uncompressed_size
                chunks.append(Chunk(str(segment), group, split_of(file, group), size))
    return chunks


def read_chunk(chunk: Chunk) -> Iterator[Texts]:
    """The records of a chunk in order, about BATCH_BYTES of them at a time: never the whole chunk in memory.

    Raises UserError if its segment is not whole.
    """
    import pyarrow.parquet as pq

    read_manifest(Path(chunk.segment))
    with pq.ParquetFile(Path(chunk.segment) / FILE_NAME) as file:
        rows = file.metadata.row_group(chunk.group).num_rows * BATCH_BYTES // max(chunk.bytes, 1)
        columns = ["text", "document", "bytes", "source"]
        for batch in file.iter_batches(max(rows, 1), row_groups=[chunk.group], columns=columns, use_threads=False):
            numbers = [batch[name].to_numpy().astype(np.int64) for name in columns[1:]]
            yield Texts(batch["text"].to_pylist(), *numbers)

"""A corpus in chunks: row groups of its segments' Parquet, some 16 MB of text each, that any process can read alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gptcore.corpus.segments import FILE_NAME, segment_dirs, split_of
from gptcore.store import read_manifest

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Chunk:
    """One row group, which holds one split only. `bytes` is its text, for progress."""

    segment: str
    group: int
    split: str
    bytes: int


@dataclass(frozen=True)
class Texts:
    """The records of a chunk: an Arrow column of texts, and (n,) int64 each: document number in the segment, UTF-8 bytes,
    source number."""

    column: pyarrow.Array
    documents: np.ndarray
    bytes: np.ndarray
    sources: np.ndarray

    def batches(self, n_bytes: int = 2 << 20) -> Iterator[list[str]]:
        """The texts in order as lists of about `n_bytes` together: Python strings of few at a time."""
        ends = np.cumsum(self.bytes)
        begin = 0
        while begin < len(ends):
            before = int(ends[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, before + n_bytes, side="right")))
            yield self.column.slice(begin, end - begin).to_pylist()
            begin = end


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


def read_chunk(chunk: Chunk) -> Texts:
    """The records of a chunk, in order. Raises UserError if its segment is not whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.default_memory_pool().release_unused()  # of the chunk before
    read_manifest(Path(chunk.segment))
    with pq.ParquetFile(Path(chunk.segment) / FILE_NAME) as file:
        table = file.read_row_group(chunk.group, columns=["document", "source", "text", "bytes"], use_threads=False)
    numbers = [table[name].to_numpy().astype(np.int64) for name in ("document", "bytes", "source")]
    (column,) = table["text"].chunks if table["text"].num_chunks == 1 else [table["text"].combine_chunks()]
    return Texts(column, *numbers)

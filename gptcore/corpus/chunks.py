"""A corpus in chunks: row groups of its segments' Parquet, some 16 MB of text each, that any process can read alone.

Whoever lists the chunks has verified the whole files, and gives each chunk the sha256 of its own bytes; whoever reads a chunk, in
another process or on another machine, verifies these. So no byte is hashed as often as there are processes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gptcore.corpus.segments import FILE_NAME, open_parquet, segment_dirs, split_of
from gptcore.store import HASHERS, DamagedError

if TYPE_CHECKING:
    import pyarrow.parquet as pq

BATCH_BYTES = 1 << 20
TAIL_BYTES = 8  # at the end of a Parquet file: the length of its footer, and "PAR1"


@dataclass(frozen=True)
class Chunk:
    """One row group, which holds one split only. `bytes` is its text, for progress; `sha256` of the bytes it is read from."""

    segment: str
    group: int
    split: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Texts:
    """Some records: their texts, and (n,) int64 each: document number in the segment, UTF-8 bytes, source number."""

    texts: list[str]
    documents: np.ndarray
    bytes: np.ndarray
    sources: np.ndarray


def list_chunks(directory: Path) -> list[Chunk]:
    """The chunks of a corpus or of one segment, in order. Raises UserError for a directory that is not whole."""
    chunks = []
    for segment in segment_dirs(directory):
        path = segment / FILE_NAME
        with open_parquet(path) as file, ThreadPoolExecutor(HASHERS) as pool:
            text = file.schema_arrow.names.index("text")
            hashes = pool.map(lambda group, of=file, at=path: _hash_group(at, of, group), range(file.num_row_groups))
            for group, sha256 in enumerate(hashes):
                size = file.metadata.row_group(group).column(text).total_uncompressed_size
                chunks.append(Chunk(str(segment), group, split_of(file, group), size, sha256))
    return chunks


def read_chunk(chunk: Chunk) -> Iterator[Texts]:
    """The records of a chunk in order, about BATCH_BYTES of them at a time: never the whole chunk in memory.

    Raises DamagedError when its bytes are not those that `list_chunks` saw.
    """
    path = Path(chunk.segment) / FILE_NAME
    with open_parquet(path) as file:
        if chunk.group >= file.num_row_groups or _hash_group(path, file, chunk.group) != chunk.sha256:
            raise DamagedError(f"{path}: not what it was when it was verified; delete {path.parent} and run again to remake it")
        rows = file.metadata.row_group(chunk.group).num_rows * BATCH_BYTES // max(chunk.bytes, 1)
        columns = ["text", "document", "bytes", "source"]
        for batch in file.iter_batches(max(rows, 1), row_groups=[chunk.group], columns=columns, use_threads=False):
            numbers = [batch[name].to_numpy().astype(np.int64) for name in columns[1:]]
            yield Texts(batch["text"].to_pylist(), *numbers)


def _hash_group(path: Path, file: pq.ParquetFile, group: int) -> str:
    """sha256 of all that a row group is read from: its columns' bytes, and the footer that says where they are."""
    columns = [file.metadata.row_group(group).column(number) for number in range(file.metadata.num_columns)]
    begin = min(column.dictionary_page_offset or column.data_page_offset for column in columns)
    size = sum(column.total_compressed_size for column in columns)
    digest = hashlib.sha256()
    with open(path, "rb") as raw:
        raw.seek(begin)
        digest.update(raw.read(size))
        raw.seek(-TAIL_BYTES, os.SEEK_END)
        footer = int.from_bytes(raw.read(TAIL_BYTES)[:4], "little")
        raw.seek(-TAIL_BYTES - footer, os.SEEK_END)
        digest.update(raw.read())
    return digest.hexdigest()

"""Room 1, corpus: sources become clean, deduplicated, split documents in committed directories.
A source is read as a stream: file → archive member → document → cleaning → deduplication → sections → Parquet, by
several processes where there is much of it (`sources`, `containers`, `formats`, `cleaning`, `records`, `pool`, `ingest`,
`build`). What is on disk, and how it is read back, is in `segments`; one ingest adds one segment and touches no other.
A segment's id depends on its texts and their split, never on paths, compression or the number of processes.

Importing this package loads no pyarrow and no pandas, because the trainer imports rooms above it.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from gptcore.config import DataConfig
from gptcore.corpus.build import Build, commit
from gptcore.corpus.preflight import estimate
from gptcore.corpus.segments import SPLITS, read_batches, read_documents, read_records, segment_dirs
from gptcore.corpus.statistics import length_histogram, summarise

__all__ = ["SPLITS", "build_corpus", "estimate", "find_corpus", "length_histogram", "locate_corpus"]
__all__ += ["read_batches", "read_documents", "read_records", "segment_dirs", "summarise"]


def find_corpus(data: DataConfig, home: Path) -> Path | None:
    """The committed corpus of a source whose files are untouched since; None if there is something to read.

    Looks at names, sizes and times only (an address is asked whether it changed).
    """
    return Build(data, home, write=False).unchanged()


def locate_corpus(data: DataConfig, home: Path) -> Path:
    """The directory this source and these settings belong to, committed yet or not. Reads what it has to, writes nothing.

    Raises UserError for a source that is missing, empty, unreachable or not text.
    """
    with closing(Build(data, home, write=False)) as build:
        return build.locate().directory


def build_corpus(data: DataConfig, home: Path) -> Path:
    """Read, clean, deduplicate and split what is new in the source; return the committed directory. Early return when nothing is.

    Raises UserError as `locate_corpus` does, and for a text that cannot be split.
    """
    with closing(Build(data, home, write=True)) as build:
        return commit(build, build.locate())

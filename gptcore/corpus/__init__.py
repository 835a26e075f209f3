"""Room 1, corpus: sources become clean, deduplicated, split documents in committed directories.

A source is read as a stream: file → archive member → document → cleaning → deduplication → sections → Parquet, by
several processes where there is much of it (`sources`, `containers`, `formats`, `cleaning`, `records`, `pool`, `ingest`,
`build`). What is on disk, and how it is read back, is in `segments`; one ingest adds one segment and touches no other.
A segment's id depends on its texts and their split, never on paths, compression or the number of processes.

Importing this package loads no pyarrow and no pandas, because the trainer imports rooms above it.
"""

from gptcore.corpus.build import build_corpus, find_corpus, locate_corpus
from gptcore.corpus.preflight import estimate
from gptcore.corpus.segments import SPLITS, read_batches, read_documents, read_records, segment_dirs
from gptcore.corpus.statistics import length_histogram, summarise

__all__ = ["SPLITS", "build_corpus", "estimate", "find_corpus", "length_histogram", "locate_corpus"]
__all__ += ["read_batches", "read_documents", "read_records", "segment_dirs", "summarise"]

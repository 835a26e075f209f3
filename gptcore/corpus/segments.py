"""A corpus on disk: immutable segments that hold the records, and a corpus directory that lists them.

    home/data/segments/<id>/documents.parquet     a row per record: document, section, split, source, title, text, bytes,
                                                  characters, digest (of its document); a row group holds one split only
    home/data/segments/<id>/digests.npy           (documents, 2) uint64: sha256 of each document, first half
    home/data/segments/<id>/ngrams_{train,val}.npy    sketches for the overlap between the splits
    home/data/segments/<id>/signatures.npy        near-duplicates' MinHashes, where they were looked for
    home/data/corpora/<id>/manifest.json          the segments in order, and the counts of all of them

Documents are numbered along the segments. A corpus finds its segments beside it, so the tree may be moved as a whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptcore.config import UserError
from gptcore.corpus.overlap import NgramSketch, measure_overlap
from gptcore.errors import first_line
from gptcore.store import DamagedError, content_id, raise_refused, read_manifest, verified

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

FORMAT = 3  # a change of the files, or of what goes into them, makes new ids
FILE_NAME = "documents.parquet"
SPLITS = ("train", "val")
ROW_GROUP_BYTES = 16 << 20  # text per row group: what writer and reader hold in memory
COLUMNS = ["document", "section", "source", "text", "bytes"]


@dataclass(frozen=True)
class Record:
    """One row of the corpus: a whole document, or a section of one."""

    document: int
    section: int
    text: str
    bytes: int
    source: int = 0


def segment_dirs(directory: Path) -> list[Path]:
    """The segments of a corpus directory, in order; a segment directory is its own. Every file of them is verified.

    Raises UserError for a directory that is not committed, damaged, or lacks a segment.
    """
    manifest = verified(directory)
    if manifest.get("kind") == "segment":
        return [directory]
    if manifest.get("kind") != "corpus" or manifest.get("format") != FORMAT:
        raise UserError(
            f"{directory}: not a corpus of this version (kind {manifest.get('kind')!r}, format {manifest.get('format')}); run again to remake it"
        )
    found = [directory.parent.parent / "segments" / name for name in manifest["segments"]]
    for segment in found:
        verified(segment)
    return found


def read_batches(directory: Path, split: str | None, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Arrow batches of up to 16 MiB of text of one split (None: both), for readers that want no Python object per record.

    Args:
        directory: A corpus, or one segment of it; documents are numbered within it.
        split: "train", "val" or None.
        columns: Any of document, section, split, source, title, text, bytes, characters, digest.
    """
    import pyarrow as pa

    assert split in (*SPLITS, None), split
    columns = columns or COLUMNS
    before = 0
    for segment in segment_dirs(directory):
        with open_parquet(segment / FILE_NAME) as file:
            wanted = [group for group in range(file.num_row_groups) if split in (None, split_of(file, group))]
            for group in wanted:
                for batch in file.read_row_group(group, columns=columns, use_threads=False).to_batches():
                    if before and "document" in columns:
                        numbers = pa.array(batch["document"].to_numpy() + before)
                        batch = batch.set_column(columns.index("document"), "document", numbers)
                    yield batch
        before += read_manifest(segment)["documents"]


def read_records(directory: Path, split: str) -> Iterator[Record]:
    """The records of one split, in document order; memory for one row group."""
    for batch in read_batches(directory, split):
        for at in range(0, batch.num_rows, 1000):
            for row in batch.slice(at, 1000).to_pylist():
                yield Record(**row)


def read_documents(directory: Path, split: str) -> Iterator[str]:
    """The texts of one split, in order: whole documents, or the sections of documents that were cut."""
    for batch in read_batches(directory, split, ["text"]):
        for at in range(0, batch.num_rows, 1000):
            yield from batch.slice(at, 1000).column(0).to_pylist()


def corpus_dir_of(segments: list[str], weights: list[float], home: Path) -> Path:
    """The directory of the corpus of these segments, committed yet or not; the weights of several sources belong to it."""
    mixture = {"mixture": [weight / sum(weights) for weight in weights]} if len(weights) > 1 else {}
    return home / "data" / "corpora" / content_id({"format": FORMAT, "segments": segments} | mixture)


def add_up(segments: list[dict[str, Any]]) -> dict[str, Any]:
    """What the manifests of some segments count, together: documents, bytes, …, of all, of each split and of each source."""

    def sums(rows: list[dict[str, int]], keys: Iterable[str]) -> dict[str, int]:
        return {key: sum(row[key] for row in rows) for key in keys}

    first = segments[0]
    return {
        **sums(segments, ("documents", "bytes", "sections", "near_duplicates")),
        "splits": {split: sums([part["splits"][split] for part in segments], first["splits"][split]) for split in SPLITS},
        "sources": [sums([part["sources"][n] for part in segments], counts) for n, counts in enumerate(first["sources"])],
        "lengths": np.sum([part["lengths"] for part in segments], axis=0).tolist(),
    }


def overlap_of(held_out: list[Path], training: list[Path]) -> float:
    """Share (0 to 1) of the validation text's 48-byte sequences of some segments that stand in the training text of others."""
    val = [rows for folder in held_out for rows in load_arrays(folder, "ngrams_val")]
    train = [rows for folder in training for rows in load_arrays(folder, "ngrams_train")]
    return measure_overlap(val, train)


def load_arrays(directory: Path, name: str) -> list[np.ndarray]:
    """`<name>.npy` of every segment that has one."""
    paths = [segment / f"{name}.npy" for segment in segment_dirs(directory)]
    return [np.load(path, allow_pickle=False) for path in paths if path.exists()]


@contextlib.contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Our own Parquet file; its pages carry checksums, which are compared. Raises DamagedError for what is none, there or inside, OSError for
    what cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError):
            raise_refused(error, path)
        raise DamagedError(
            f"{path}: cannot be read ({first_line(error)}); delete {path.parent} and run again to remake it"
        ) from None


def split_of(file: Any, group: int) -> str:
    """The split of a row group of an open `pyarrow.parquet.ParquetFile`."""
    statistics = file.metadata.row_group(group).column(file.schema_arrow.names.index("split")).statistics
    assert statistics is not None, "a row group states its split"
    assert statistics.min == statistics.max, "a row group holds one split"
    return str(statistics.min)


class SegmentWriter:
    """Streams records into a folder; compression runs in a thread of its own beside the caller."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.folder = folder
        columns = {
            "document": pa.int64(),
            "section": pa.int32(),
            "split": pa.string(),
            "source": pa.int16(),
            "title": pa.string(),
        }
        columns |= {"text": pa.large_string(), "bytes": pa.int64(), "characters": pa.int64(), "digest": pa.binary(16)}
        self.schema = pa.schema(columns)
        options = {"compression": "zstd", "compression_level": 1, "data_page_size": 1 << 20}
        options |= {
            "write_page_checksum": True,
            "use_dictionary": ["split", "source", "title", "section"],
            "write_statistics": ["split"],
        }
        self._file = pq.ParquetWriter(folder / FILE_NAME, self.schema, **options)
        self._pending: dict[str, list[pa.RecordBatch]] = {split: [] for split in SPLITS}
        self._bytes = dict.fromkeys(SPLITS, 0)
        self._thread = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None

    def write(self, split: str, batch: pa.RecordBatch, text_bytes: int) -> None:
        """Some records of one split, in the schema's columns."""
        if batch.num_rows:
            self._pending[split].append(batch)
            self._bytes[split] += text_bytes
            if self._bytes[split] >= ROW_GROUP_BYTES:
                self._flush(split)

    def close(self, digests: np.ndarray, sketches: dict[str, NgramSketch], signatures: list[bytes]) -> None:
        """Finish all files."""
        for split in SPLITS:
            self._flush(split)
        self._wait()
        self._file.close()
        np.save(self.folder / "digests.npy", digests, allow_pickle=False)
        for split, sketch in sketches.items():
            np.save(self.folder / f"ngrams_{split}.npy", sketch.finish(), allow_pickle=False)
        if signatures:
            rows = np.frombuffer(b"".join(signatures), dtype="<u4").reshape(len(signatures), -1)
            np.save(self.folder / "signatures.npy", rows, allow_pickle=False)

    def abort(self) -> None:
        """End the thread and close the file, whatever state they are in; the folder is not to be used."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        with contextlib.suppress(OSError):
            self._file.close()

    def _flush(self, split: str) -> None:
        batches, self._pending[split], self._bytes[split] = self._pending[split], [], 0
        if batches:
            self._wait()
            self._running = self._thread.submit(self._write, batches)

    def _write(self, batches: list[pa.RecordBatch]) -> None:
        import pyarrow as pa

        table = pa.Table.from_batches(batches, self.schema)
        self._file.write_table(table, row_group_size=max(table.num_rows, 1))

    def _wait(self) -> None:
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

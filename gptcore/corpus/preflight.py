"""Before work starts: how many documents, how much text, disk, memory and time a source will take, from a sample.

Up to 200 files, spread evenly, are read from their beginning for up to 1 MiB of text each, for about a quarter of a second.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from gptcore.config import DataConfig, UserError
from gptcore.corpus.containers import Kind
from gptcore.corpus.records import make_batch, read_texts
from gptcore.corpus.sections import SplitPlan
from gptcore.corpus.sources import SourceFile, list_files, plan_units
from gptcore.parallel import count_cores

MAX_FILES, MIN_FILES = 200, 8
SAMPLE_BYTES = 1 << 20  # of text from each
SAMPLE_SECONDS = 0.25
SHARD_TOKENS = 100_000_000
DOCUMENT_MEMORY = 100  # bytes: digests and ledger
PROCESS_MEMORY = 160 << 20  # a worker with pyarrow and its batches
KEEP_FREE = 64 << 20  # disk left over for the system


@dataclass(frozen=True)
class Estimate:
    """What a source will take; text and tokens are upper guesses, not promises."""

    files: int
    source_bytes: int  # of the files as they are
    documents: int
    text_bytes: int
    disk_bytes: int  # documents.parquet, and shards of one token per byte at two bytes each
    disk_free: int
    memory_bytes: int
    memory_free: int
    seconds: float
    shards: int  # at most: a token per byte

    def __str__(self) -> str:
        return (
            f"{self.files:,} files, about {self.documents:,} documents and {_size(self.text_bytes)} of text; up to "
            f"{_size(self.disk_bytes)} of disk ({_size(self.disk_free)} free), {_size(self.memory_bytes)} of memory "
            f"({_size(self.memory_free)} free), about {self.seconds:,.0f} s, at most {self.shards:,} shards"
        )


def estimate(data: DataConfig, home: Path) -> Estimate:
    """What ingesting `data.source` will take. Fetches it first, if it is not here.

    Raises UserError for a source that is missing, unreachable, or not text where the sample looked.
    """
    return estimate_files(list_files(data, home)[0], data, home)


def estimate_files(files: list[SourceFile], data: DataConfig, home: Path) -> Estimate:
    """`estimate` for files that are listed already."""
    documents = text = 0.0
    read = sampled = stored = looked = 0
    plan = SplitPlan("section" if data.split == "section" else "document", "threshold", data.val_fraction)
    make_batch([], data, plan)  # the libraries are loaded before the clock runs
    started = time.perf_counter()
    for number in _spread(len(files)):
        entries = next(plan_units([(number, files[number])], data), [])
        texts, held = [], 0
        for item in islice(read_texts(entries, data, {number: Counter()}), 20_000):
            texts.append(item)
            held += len(item.utf8)
            if held >= SAMPLE_BYTES:
                break
        share = _share_read(files[number], held)
        documents += len(texts) / share
        text += held / share
        read, sampled, looked = read + files[number].size, sampled + held, looked + 1
        stored += _parquet_bytes(b"".join(item.utf8 for item in texts)[:SAMPLE_BYTES])
        make_batch(texts, data, plan)
        if time.perf_counter() - started > SAMPLE_SECONDS and looked >= MIN_FILES:
            break
    seconds = time.perf_counter() - started
    if not sampled and looked == len(files):
        raise UserError(f"data.source={data.source_name!r}: no text in it; give a UTF-8 text file or a folder of them")
    text_bytes = int(text * sum(file.size for file in files) / max(read, 1))
    n_documents = int(documents * len(files) / looked)
    processes = data.processes or count_cores()
    compressed = text_bytes * (stored / max(sampled, 1))
    disk = next(path for path in (home, *home.parents) if path.exists())  # a look makes nothing
    return Estimate(
        files=len(files),
        source_bytes=sum(file.size for file in files),
        documents=n_documents,
        text_bytes=text_bytes,
        disk_bytes=int(compressed + 2 * text_bytes),
        disk_free=shutil.disk_usage(disk).free,
        memory_bytes=DOCUMENT_MEMORY * n_documents + PROCESS_MEMORY * (processes + 1),
        memory_free=_memory_free(),
        seconds=seconds * text_bytes / max(sampled, 1) / max(processes * 0.7, 1),
        shards=2 + text_bytes // SHARD_TOKENS,
    )


def refuse_impossible(estimate: Estimate) -> None:
    """Raises UserError, with the numbers, where disk or memory cannot be enough."""
    if estimate.disk_bytes + KEEP_FREE > estimate.disk_free:
        raise UserError(
            f"data.source: not enough disk: {estimate}; free some, point GPTLOOM_HOME at a larger disk, or give less text"
        )
    if estimate.memory_bytes > estimate.memory_free:
        raise UserError(f"data.source: not enough memory: {estimate}; lower data.processes, or give less text with data.source")


def _spread(count: int) -> list[int]:
    """Up to MAX_FILES distinct numbers below `count` such that any first few of them are spread over it."""
    golden = (5**0.5 - 1) / 2
    return list(dict.fromkeys(int(i * golden % 1 * count) for i in range(min(count, MAX_FILES))))


def _share_read(file: SourceFile, held: int) -> float:
    """The share of a file that a sample of `held` bytes of text is; exact for plain text, a guess for the rest."""
    kind = Kind.of(file.name)
    if held < SAMPLE_BYTES:
        return 1.0
    expansion = 4.0 if kind.compressions or kind.inner in ("zip", "parquet") else 1.0
    return min(1.0, held / max(file.size * expansion, 1))


def _parquet_bytes(utf8: bytes) -> int:
    import pyarrow as pa

    return len(pa.compress(utf8, "zstd", asbytes=True)) if utf8 else 0


def _memory_free() -> int:
    """Bytes a new process may use: the machine's available memory, or what is left of the container's."""
    import psutil

    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no container, or its limit is "max"
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free


def _size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count:,} bytes"

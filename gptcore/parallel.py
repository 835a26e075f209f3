"""Chunks of work on all cores: a process per chunk, results in order, memory for a few chunks, a progress bar on stderr.

    with Progress("encoding", total_bytes) as progress:
        for result in map_processes(encode_chunk, jobs):
            progress.add(n_bytes)

A `ChunkMap` runs one function over jobs wherever it likes; `map_processes` is this machine's, `tasks.data` has one for a
Dask cluster. What a job is never depends on who runs it, so neither do the results.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType
from typing import Any

# function (importable by name), jobs (small, picklable values) → results in the order of the jobs
ChunkMap = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]
JOBS_PER_WORKER = 3  # a process for fewer is not worth its start
AHEAD = 2  # jobs per worker under way or waiting to be taken


def count_cores() -> int:
    """The cores this process may use; GPTLOOM_WORKERS overrides it."""
    asked = os.environ.get("GPTLOOM_WORKERS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_here(function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
    """The jobs one after the other in this process."""
    return map(function, jobs)


def map_processes(function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
    """The jobs on all cores, in processes that die with this one. Few jobs stay here: starting a process costs several."""
    workers = min(count_cores(), len(jobs) // JOBS_PER_WORKER)
    if workers < 2:
        yield from map_here(function, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_enter_worker, initargs=(os.getpid(),)) as pool:
        yield from in_order(lambda job: pool.submit(function, job), jobs, AHEAD * workers)


def run_apart(function: Callable[..., Any], *args: Any) -> Any:
    """One call in a process of its own: what it prints goes nowhere, its memory is given back."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_enter_worker, initargs=(os.getpid(), True)) as pool:
        return pool.submit(function, *args).result()


def in_order(submit: Callable[[Any], Any], jobs: Sequence[Any], window: int) -> Iterator[Any]:
    """Results of futures in the order of the jobs, never more than `window` submitted and not yet taken."""
    waiting: deque[Future[Any]] = deque()
    try:
        for job in jobs:
            if len(waiting) == window:
                yield waiting.popleft().result()
            waiting.append(submit(job))
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class Progress:
    """A bar with MB/s and time left where stderr is a terminal; elsewhere nothing, the log has the totals."""

    def __init__(self, title: str, total_bytes: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total_bytes,
            desc=title,
            unit="B",
            unit_scale=True,
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
            leave=False,
        )

    def add(self, n_bytes: int) -> None:
        self._bar.update(n_bytes)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def _enter_worker(parent: int, alone: bool = False) -> None:
    """Die with the parent and leave Ctrl-C to it; one of many uses one thread, one `alone` is silenced."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if alone:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    else:
        os.dup2(2, 1)
        # The second is fastokens': its spinning threads cost a quarter more time, and 50 MB.
        for name in ("RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS", "OMP_NUM_THREADS"):
            os.environ[name] = "1"

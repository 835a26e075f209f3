"""Chunks of work on all cores: a process per chunk, results in order, memory for a few chunks, a progress bar on stderr.

A `ChunkMap` runs one function over jobs wherever it likes; `map_processes` is this machine's, `gptloom.tasks.data` has one for a
Dask cluster. What a job is never depends on who runs it, so neither do the results.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

# function (importable by name), jobs (small, picklable values) → results in the order of the jobs
ChunkMap = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]
JOBS_PER_WORKER = 3  # a process for fewer is not worth its start
JOBS_PER_LIFE = 16  # a process is replaced after so many
PRELOADED = ["numpy", "pyarrow.parquet", "gptcore.shards"]  # what jobs import; shared pages, and half a second each
AHEAD = 2  # jobs per worker under way or waiting to be taken


def count_cores() -> int:
    """The cores this process may use; GPTLOOM_WORKERS overrides it."""
    asked = os.environ.get("GPTLOOM_WORKERS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_processes(function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
    """The jobs on all cores, in processes that die with this one. Few jobs stay here: starting a process costs several."""
    workers = min(count_cores(), len(jobs) // JOBS_PER_WORKER)
    if workers < 2:
        yield from map(function, jobs)
        return
    release_memory()
    # A worker is replaced after a while: what it remembers (an encoder, every word it met) may not grow with the corpus.
    for begin in range(0, len(jobs), workers * JOBS_PER_LIFE):
        with _pool(workers) as pool:
            submit: Callable[[Any], Any] = partial(pool.submit, function)  # type: ignore[call-arg]
            yield from in_order(submit, jobs[begin : begin + workers * JOBS_PER_LIFE], AHEAD * workers)


def run_apart(function: Callable[..., Any], *args: Any) -> Any:
    """One call in a process of its own: what it prints goes nowhere, its memory is given back."""
    with _pool(1, alone=True) as pool:
        return pool.submit(function, *args).result()


@contextmanager
def _pool(workers: int, *, alone: bool = False) -> Iterator[ProcessPoolExecutor]:
    """Processes forked from a server that has done the imports. Raises MemoryError when one of them is killed."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
    else:
        context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_enter_worker, initargs=(alone,)) as pool:
            yield pool
    except BrokenProcessPool:
        raise MemoryError(
            f"a worker process was killed, most likely for memory; set GPTLOOM_WORKERS to fewer than {workers}, or free some"
        ) from None


def release_memory() -> None:
    """Give back to the system what earlier steps freed: Arrow's pool and glibc's heap keep it otherwise, hundreds of MB."""
    arrow = sys.modules.get("pyarrow")
    if arrow is not None:
        arrow.default_memory_pool().release_unused()
    _call_libc("malloc_trim", 0)


def _call_libc(name: str, *args: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
    if function is not None:  # musl has none of these
        function(*args)


class _NoPandas(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name, name=name)


def go_without_pandas() -> None:
    """For a worker process: pyarrow would import pandas to see whether an array is one of its own, 0.2 s a process."""
    sys.meta_path.insert(0, _NoPandas())


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


def progress_bar(title: str, total_bytes: int) -> tqdm[Any]:
    """A bar with MB/s and time left where stderr is a terminal; elsewhere nothing, the log has the totals."""
    from tqdm import tqdm

    return tqdm(desc=title, total=total_bytes, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty())


def _enter_worker(alone: bool) -> None:
    """Die with the process that wants our work, and leave Ctrl-C to it. One of many uses one thread, one `alone` is silenced."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if alone:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        return
    os.dup2(2, 1)
    go_without_pandas()
    # The second is fastokens': its spinning threads cost a quarter more time, and 50 MB.
    for name in ("RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = "1"
    _call_libc("mallopt", -8, 1)  # M_ARENA_MAX: one heap for one thread's work spares 30 MB


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # returns when it ends, however it ends
    os._exit(1)

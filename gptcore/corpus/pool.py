"""Several processes that read and clean side by side, as one ordered stream of batches with a bounded backlog.

Each worker has a thread here that hands it the next unit and takes its batches into a queue of two; the batches come
out in the units' order. So the result does not depend on the number of processes, and a slow reader slows the workers
instead of filling the memory.
"""

from __future__ import annotations

import contextlib
import json
import queue
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from subprocess import PIPE, Popen
from typing import Any

from gptcore.config import DataConfig, UserError
from gptcore.corpus.records import Batch, read_batches_of
from gptcore.corpus.sections import SplitPlan
from gptcore.corpus.sources import Entry
from gptcore.entry import python_environment
from gptcore.errors import EXIT_MEMORY, EXIT_USER

PIPE_BYTES = 1 << 20  # Linux gives 64 KiB, and a process switch for each; 1 MiB is what it allows anyone
BACKLOG = 2  # batches a worker may be ahead


def read_units(units: Iterable[list[Entry]], data: DataConfig, plan: SplitPlan, processes: int) -> Iterator[Batch]:
    """All batches of all units, in the units' order; with one process in this one.

    Raises UserError as `read_batches_of` does.
    """
    if processes == 1:
        for unit in units:
            yield from read_batches_of(unit, data, plan)
        return
    pool = _Pool(units, data, plan, processes)
    try:
        yield from pool.batches()
    finally:
        pool.stop()


class _Pool:
    def __init__(self, units: Iterable[list[Entry]], data: DataConfig, plan: SplitPlan, processes: int) -> None:
        self.units = iter(units)
        self.lock = threading.Lock()
        self.turns: queue.SimpleQueue[queue.Queue[Any] | Exception | None] = queue.SimpleQueue()
        self.stopping = threading.Event()
        settings = json.dumps({"data": data.model_dump(mode="json"), "plan": plan.as_json()}) + "\n"
        command = [sys.executable, "-m", "gptcore.corpus.worker"]
        self.workers: list[Popen[bytes]] = []
        self.threads: list[threading.Thread] = []
        for _ in range(processes):
            worker = Popen(command, stdin=PIPE, stdout=PIPE, env=python_environment(), pipesize=PIPE_BYTES)
            self.workers.append(worker)
            self.threads.append(threading.Thread(target=self._serve, args=(worker, settings), daemon=True))
        for thread in self.threads:
            thread.start()

    def batches(self) -> Iterator[Batch]:
        finished = 0
        while finished < len(self.workers):
            turn = self.turns.get()
            if isinstance(turn, Exception):
                raise turn
            if turn is None:
                finished += 1
                continue
            while (item := turn.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item

    def stop(self) -> None:
        self.stopping.set()
        for worker in self.workers:
            worker.kill()
        for worker, thread in zip(self.workers, self.threads, strict=True):
            worker.wait()
            thread.join()
            for pipe in (worker.stdin, worker.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _serve(self, worker: Popen[bytes], settings: str) -> None:
        """One worker's thread: units in, batches out, until there are no more units."""
        import pyarrow as pa

        mine: queue.Queue[Any] | None = None
        try:
            assert worker.stdin is not None
            worker.stdin.write(settings.encode())
            reader = None
            while not self.stopping.is_set():
                with self.lock:
                    unit = next(self.units, None)
                    if unit is None:
                        break
                    mine = queue.Queue(BACKLOG)
                    self.turns.put(mine)
                worker.stdin.write(json.dumps([asdict(entry) for entry in unit]).encode() + b"\n")
                worker.stdin.flush()
                reader = reader or pa.ipc.open_stream(worker.stdout)
                while (batch := _receive(reader)) is not None:
                    self._put(mine, batch)
                self._put(mine, None)
                mine = None
            self.turns.put(None)
        except Exception as error:
            if isinstance(error, (OSError, EOFError, StopIteration, pa.ArrowException)):
                code = worker.poll()
                error = RuntimeError(
                    f"a process that reads the corpus ended early (exit code {code}; -9 is what a system without memory gives): {error}"
                )
            if mine is None:
                self.turns.put(error)
            else:
                self._put(mine, error)

    def _put(self, target: queue.Queue[Any], item: Any) -> None:
        while not self.stopping.is_set():
            try:
                target.put(item, timeout=0.2)
                return
            except queue.Full:
                continue


def _receive(reader: Any) -> Batch | None:
    """The next batch of a unit, None at its end."""
    table, metadata = reader.read_next_batch_with_custom_metadata()
    if b"facts" in metadata:
        return Batch.restore(table, metadata[b"facts"])
    if b"error" in metadata:
        message, code = metadata[b"error"].decode(), int(metadata[b"code"])
        raise {EXIT_USER: UserError, EXIT_MEMORY: MemoryError}.get(code, RuntimeError)(message)
    return None

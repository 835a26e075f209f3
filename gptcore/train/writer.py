"""Writing checkpoints beside the training: a copy is taken between two steps, a thread writes it while the next steps run.

The training waits for the copy, and for the writer only where it is still at work on the checkpoint before. What goes wrong in
the thread is raised in the loop, at the next step. (Asynchronous checkpointing as in CheckFreq, Mohan et al. 2021.)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptcore.checkpoint import Snapshot, prune_checkpoints, save_checkpoint
from gptcore.ranks import whole_of

log = logging.getLogger(__name__)


def copy_to_host(tensors: dict[str, Tensor], *, is_kept: bool = True) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Copies on the CPU, and a call that waits until they are there: a GPU copies while its host goes on.

    The copies are queued behind the step before and in front of the next one, so they hold what was there between the two.
    What is spread over processes is put together tensor by tensor, by all of them; those where not is_kept only lend their part.
    """
    copies, is_cuda = {}, False
    for name, spread in tensors.items():
        tensor = whole_of(spread)
        if not is_kept:
            continue
        if tensor.is_cuda:
            is_cuda = True
            copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copies[name].copy_(tensor.detach(), non_blocking=True)
        else:
            copies[name] = tensor.detach().clone()
    if not is_cuda:
        return copies, lambda: None
    copied = torch.cuda.Event()
    copied.record()
    return copies, copied.synchronize


@dataclass(frozen=True)
class Written:
    """A checkpoint that is on disk, and what it took."""

    step: int
    stall_ms: float  # for which the training stood still: the writer before, and the copies
    write_ms: float  # beside the training: the files, their hashes, flushing, deleting old ones


class CheckpointWriter:
    """One thread, one checkpoint at a time. `on_written` is called in the caller's thread, by `submit`, `check` and `wait`."""

    def __init__(self, folder: Path, last: int, every: int, on_written: Callable[[Written], None]) -> None:
        """folder: of the checkpoints. last, every: what `prune_checkpoints` keeps."""
        self.folder, self._last, self._every = folder, last, every
        self._on_written = on_written
        self._thread = ThreadPoolExecutor(1, "gptloom-checkpoints")
        self._pending: Future[Written] | None = None

    def submit(self, snapshot: Snapshot, wait_for_copies: Callable[[], None], began: float) -> None:
        """Begin to write what stopped the training at `began` (perf_counter's seconds)."""
        assert self._pending is None, "wait before taking the next snapshot: two in memory are one too many"
        self._pending = self._thread.submit(self._write, snapshot, wait_for_copies, began)

    def check(self) -> None:
        """Raises what went wrong in the thread. Costs nothing while it is at work."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until what was submitted is on disk; raises what went wrong."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._on_written(pending.result())

    def close(self) -> None:
        """Let the thread finish. An error that nobody asked for is only logged: another one is on its way."""
        self._thread.shutdown(wait=True)
        if self._pending is not None and (error := self._pending.exception()) is not None:
            log.warning("the last checkpoint could not be written: %s", error)

    def _write(self, snapshot: Snapshot, wait_for_copies: Callable[[], None], began: float) -> Written:
        wait_for_copies()
        copied = time.perf_counter()
        save_checkpoint(self.folder, snapshot)
        prune_checkpoints(self.folder, self._last, self._every)
        return Written(snapshot.step, 1e3 * (copied - began), 1e3 * (time.perf_counter() - copied))

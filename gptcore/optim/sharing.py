"""How several processes make a stack of matrices orthogonal, each matrix once, while their exchanges run beside their products.

Whole matrices on every process (DDP): each does its slice of the stack, and all get all slices. Rows spread over the processes
(FSDP2): every matrix is sent to the process whose slice it is in, done there and its rows sent back. What travels has the type
of the products, so nothing is lost on the way that one process would have kept.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator

import torch
from torch import Tensor

from gptcore.ranks import Ranks

Orthogonal = Callable[[Tensor], Tensor]


def in_turns(tasks: Iterable[Iterator[None]]) -> None:
    """Run tasks that pause; at every turn one more begins, so that the exchange of one runs beside the work of the one before."""
    running: list[Iterator[None]] = []
    for task in tasks:
        # The newest first: its exchange starts before the others compute.
        running.insert(0, task)
        running = [task for task in running if not _is_over(task)]
    while running:
        running = [task for task in running if not _is_over(task)]


def _is_over(task: Iterator[None]) -> bool:
    for _ in task:
        return False
    return True


def share_out(
    update: Tensor, rows: int, orthogonal: Orthogonal, dtype: torch.dtype, ranks: Ranks, *, is_spread: bool
) -> Generator[None, None, Tensor]:
    """`update` (n, rows, columns) made orthogonal by all processes together; pauses where others have to be heard.

    is_spread: `update` holds this process's rows only, and so does what is returned. dtype: of what travels.
    """
    # Alone there is nothing to share. Several would otherwise all do the same work, and Muon's cost would not shrink with more
    # GPUs.
    if ranks.count == 1:
        return orthogonal(update)
    if is_spread:
        return (yield from _by_owner(update, rows, orthogonal, dtype, ranks))
    return (yield from _by_slice(update, orthogonal, dtype, ranks))


def _own_slice(n: int, ranks: Ranks) -> tuple[int, slice]:
    """Matrices of a slice, and which of a stack of n are this process's: fewer or none for the last ones."""
    size = -(-n // ranks.count)
    return size, slice(min(n, ranks.rank * size), min(n, (ranks.rank + 1) * size))


def _by_slice(update: Tensor, orthogonal: Orthogonal, dtype: torch.dtype, ranks: Ranks) -> Generator[None, None, Tensor]:
    n = len(update)
    size, mine = _own_slice(n, ranks)
    # All parts have one size, as a gather wants them: what the last slices lack is filled up with zeros.
    part = update.new_zeros(size, *update.shape[1:], dtype=dtype)
    if mine.start < mine.stop:
        part[: mine.stop - mine.start] = orthogonal(update[mine])
    whole, work = ranks.start_gather(part)
    yield
    work.wait()
    return whole[:n].to(update.dtype)


def _by_owner(
    update: Tensor, rows: int, orthogonal: Orthogonal, dtype: torch.dtype, ranks: Ranks
) -> Generator[None, None, Tensor]:
    n, own_rows, columns = update.shape
    size, mine = _own_slice(n, ranks)
    height = -(-rows // ranks.count)  # FSDP2 gives all but the last processes so many rows
    # Rows of a matrix cannot be made orthogonal apart, so those of each matrix meet on one process and go home again.
    sent = update.new_zeros(ranks.count * size, height, columns, dtype=dtype)
    sent[:n, :own_rows] = update
    received, work = ranks.start_exchange(sent.view(ranks.count, size, height, columns))
    yield
    work.wait()
    matrices = received.transpose(0, 1).reshape(size, ranks.count * height, columns)
    if (count := mine.stop - mine.start) > 0:
        matrices[:count, :rows] = orthogonal(matrices[:count, :rows].to(update.dtype).contiguous())
    sent = matrices.view(size, ranks.count, height, columns).transpose(0, 1).contiguous()
    received, work = ranks.start_exchange(sent)
    yield
    work.wait()
    return received.view(-1, height, columns)[:n, :own_rows].to(update.dtype)

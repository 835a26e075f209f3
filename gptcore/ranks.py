"""The processes of one training: how many, which of them this is, and the few words they exchange.

Whoever starts several (gptcore/launch.py, `torchrun`) sets RANK, WORLD_SIZE and LOCAL_RANK; without it there is one process and nothing is exchanged. NCCL carries what is
on GPUs, gloo what is on CPUs, in the same group. With FSDP2 a parameter's rows are spread over the processes: such a tensor is a
DTensor, and the functions below are all that the rest of the code needs to know of it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process's place among `count`."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # on this host: the number of its GPU

    @property
    def is_first(self) -> bool:
        """The one that writes: journal, checkpoints, result."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """True on all where it is true on one."""
        return bool(self.sum_(torch.tensor(float(flag))) > 0)

    def from_first(self, value: float) -> float:
        """The first process's value, on all."""
        if self.count == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(tensor, 0)
        return tensor.item()

    def smallest(self, value: float) -> float:
        """The smallest of all processes' values, on all."""
        if self.count == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor.item()

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor, which has one shape on all of them, in order; on all."""
        if self.count == 1:
            return [tensor]
        tensors = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(tensors, tensor)
        return tensors

    def start_gather(self, part: Tensor) -> tuple[Tensor, Any]:
        """Every process's part (n, …) behind one another, (count · n, …), once the second thing returned was waited for."""
        whole = part.new_empty(self.count * len(part), *part.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name from torch 2.13 on
        return whole, gather(_bytes(whole), _bytes(part), async_op=True)

    def start_exchange(self, parts: Tensor) -> tuple[Tensor, Any]:
        """parts: (count, …), one for each process; returns what each had for this one, (count, …), once waited for."""
        received = torch.empty_like(parts)
        return received, dist.all_to_all_single(_bytes(received), _bytes(parts), async_op=True)

    def wait(self) -> None:
        """Until all are here: the processes, not their GPUs."""
        self.sum_(torch.zeros(1))


ALONE = Ranks()


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes: what is only moved may be of a type that gloo cannot add."""
    return tensor.contiguous().view(torch.uint8)


def is_spread(tensor: Tensor) -> bool:
    """Whether its rows are spread over the processes."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """This process's rows, in the same memory; the tensor itself where it is not spread."""
    return tensor.detach().to_local() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def spread_like(part: Tensor, parameter: Tensor) -> Tensor:
    """`part` as this process's rows of a tensor that is spread like `parameter`."""
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())


def whole_of(tensor: Tensor) -> Tensor:
    """All rows, on every process, which all have to call it; the tensor itself where it is not spread."""
    return tensor.detach().full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def fill(target: Tensor, whole: Tensor) -> None:
    """Copy `whole` into `target`, or this process's rows of it where `target` is spread."""
    part = local_part(target)
    if is_spread(target):
        size = -(-len(whole) // target.device_mesh.size())  # type: ignore[attr-defined]
        start = size * target.device_mesh.get_local_rank()  # type: ignore[attr-defined]
        whole = whole[start : start + size]
    part.copy_(whole)


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the others that torchrun started, for as long as the block lasts."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    ranks = Ranks(int(os.environ["RANK"]), count, int(os.environ.get("LOCAL_RANK", "0")))
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield ranks
        ranks.wait()  # nobody leaves while another still hears from it
    finally:
        gc.collect()  # a dead DDP wrapper is a cycle that keeps gloo's threads; Python's exit under them would abort
        dist.destroy_process_group()

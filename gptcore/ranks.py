"""The processes of one training: how many, which of them this is, and the few words they exchange.

    torchrun --nproc-per-node=4 -m gptcore.train CONFIG.yaml --shards DIR --out DIR

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; without it there is one process and nothing is exchanged. NCCL carries what is
on GPUs, gloo what is on CPUs, in the same group.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor, which has one shape on all of them, in order; on all."""
        if self.count == 1:
            return [tensor]
        tensors = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(tensors, tensor)
        return tensors

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()


ALONE = Ranks()


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

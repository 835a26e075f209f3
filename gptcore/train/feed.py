"""Where the step reads its batches from: the shards, or, for a small corpus on a GPU, the device's own memory."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gptcore.batches import BatchSampler
from gptcore.config import ExperimentConfig
from gptcore.device import Device
from gptcore.shards import ShardSet

ON_DEVICE_TOKENS = 1 << 26  # 256 MiB as int32


class Sampler(Protocol):
    """Sample i is a pure function of (seed, i)."""

    def batch(self, start: int, count: int) -> tuple[Any, Any]:
        """Samples `start` … `start + count - 1` as (x, y), int64 (count, T) each: arrays, or tensors on the device."""


def build_sampler(config: ExperimentConfig, shards: ShardSet, device: Device) -> Sampler:
    """The experiment's training samples."""
    sampler = BatchSampler(shards.tokens("train"), config.model.block_size, config.train.seed)
    if device.is_cuda and len(sampler.tokens) <= ON_DEVICE_TOKENS:
        return DeviceTokens(sampler, device.torch)
    return sampler


class DeviceTokens:
    """All ids on the device: the host makes window positions only, the windows are gathered where they are learnt from."""

    def __init__(self, sampler: BatchSampler, device: torch.device | str) -> None:
        tokens = sampler.tokens
        self.sampler, self.device = sampler, torch.device(device)
        self.ids = torch.from_numpy(np.asarray(tokens[0 : len(tokens)]).astype(np.int32)).to(self.device)
        self._reach = torch.arange(sampler.block_size + 1, device=self.device)

    def batch(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        starts = torch.from_numpy(self.sampler.starts(start, count)).to(self.device, non_blocking=True)
        windows = self.ids[(starts[:, None] + self._reach) % len(self.ids)].long()  # (count, T + 1)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def to_device(batch: Any, device: Device) -> Tensor:
    """One half of a batch on the device; from pinned memory, so that the copy runs beside the step before."""
    if isinstance(batch, Tensor):
        return batch
    tensor = torch.from_numpy(batch)
    return tensor.pin_memory().to(device.torch, non_blocking=True) if device.is_cuda else tensor

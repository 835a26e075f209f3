"""Where the step reads its batches from: the shards, or, for a small corpus on a GPU, the device's own memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptcore.batches import BatchSampler, ChunkSampler, DeviceTokens, Sampler, build_sampler
from gptcore.config import ExperimentConfig
from gptcore.device import Device
from gptcore.ranks import Ranks
from gptcore.shards import ShardSet

ON_DEVICE_BYTES = 256 << 20


def build_feed(config: ExperimentConfig, shards: ShardSet, device: Device, ranks: Ranks) -> Sampler:
    """The experiment's training samples, from the nearest place that holds them."""
    ahead = build_sampler(shards, config)
    sampler = ahead.sampler
    is_small = 4 * shards.n_tokens["train"] <= ON_DEVICE_BYTES
    if device.is_cuda and is_small and isinstance(sampler, BatchSampler | ChunkSampler):  # one source
        return DeviceTokens(sampler, device.torch)
    # What is read ahead is what follows; for one of several processes, others' samples follow.
    return ahead if ranks.count == 1 else sampler


def to_device(batch: Any, device: Device) -> Tensor:
    """One half of a batch on the device; from pinned memory, so that the copy runs beside the step before."""
    if isinstance(batch, Tensor):
        return batch
    tensor = torch.from_numpy(batch)
    return tensor.pin_memory().to(device.torch, non_blocking=True) if device.is_cuda else tensor

"""The parts a block is made of: normalisation and rotary positions, as functions without weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor) -> Tensor:
    """Divide by the root mean square over channels (Zhang & Sennrich 2019), without a learned gain."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_table(block_size: int, head_size: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE (Su et al. 2021), each (block_size, head_size / 2)."""
    frequency = base ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angle = torch.outer(torch.arange(block_size, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels by its position's angle. x: (B, nh, T, hs); cos, sin: (T, hs / 2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)  # (B, nh, T, hs)

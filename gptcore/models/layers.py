"""The parts a block is made of: normalisation, rotary positions, activations, and linear layers in eight bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HAS_TRITON = importlib.util.find_spec("triton") is not None


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMS norm (Zhang & Sennrich 2019) over channels; gain and bias are learned if asked for."""

    def __init__(self, channels: int, kind: str, gain: bool, bias: bool) -> None:
        super().__init__()
        self.channels, self.kind = channels, kind
        self.weight = nn.Parameter(torch.ones(channels)) if gain else None
        self.bias = nn.Parameter(torch.zeros(channels)) if gain and bias and kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        if weight is not None and weight.dtype != x.dtype:
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if self.kind == "rms":
            return F.rms_norm(x, (self.channels,), weight)
        y = F.layer_norm(x, (self.channels,), weight, bias)
        return y if y.dtype == x.dtype else y.to(x.dtype)  # autocast answers in float32


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout that costs nothing where it does nothing."""
    return F.dropout(x, p) if training and p else x


def rms_norm(x: Tensor) -> Tensor:
    """Divide by the root mean square over channels, without a learned gain."""
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


def attend_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one query a head, (B, nh, 1, hs), over keys and values (B, nh, S, hs), written out. mask: what it sees, (1, S).

    On a GPU torch's kernel for float32 leaves all keys of a head to one of its hundred processors, which for one token is most of a
    step of decoding; two products spread over all of them.
    """
    scores = q @ k.transpose(-2, -1) * q.size(-1) ** -0.5  # (B, nh, 1, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def has_kernels(qkv: Tensor, head_size: int) -> bool:
    """Whether `kernels.rotate_heads` takes it: in 16 bits on a GPU with Triton, heads a power of two wide."""
    return HAS_TRITON and qkv.is_cuda and qkv.itemsize == 2 and head_size & (head_size - 1) == 0


def relu_squared(x: Tensor) -> Tensor:
    """ReLU² (So et al. 2021)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's
    "relu2": relu_squared,
}


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products on `x`'s device are computed in at this moment: autocast's type, or x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

"""The parts a block is made of: normalisation, rotary positions, attention as each device likes it, activations."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rotary = tuple[Tensor, Tensor]  # cosines and sines of the positions, (T, hs / 2) each
HAS_TRITON = importlib.util.find_spec("triton") is not None
ROTARY_BASE = 10_000.0


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMS norm (Zhang & Sennrich 2019) over channels; gain and bias are learned if asked for."""

    def __init__(self, channels: int, kind: str, gain: bool, bias: bool) -> None:
        super().__init__()
        self.channels, self.kind = channels, kind
        self.weight = nn.Parameter(torch.ones(channels)) if gain else None
        self.bias = nn.Parameter(torch.zeros(channels)) if gain and bias and kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        # LayerNorm sets mean and size of a token's channels, RMS norm only the size: the mean turned out not to matter, and finding
        # it is a second pass over memory. Either way the layers above see inputs of one size, however the weights below grow.
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
    # The matrix that reads it can learn a gain by itself: its columns.
    return F.rms_norm(x, (x.size(-1),))


def rotary_table(block_size: int, head_size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE (Su et al. 2021), each (block_size, head_size / 2)."""
    # Frequencies from 1 to 1 / ROTARY_BASE, as a clock has hands: fast ones tell neighbours apart, slow ones far places.
    frequency = ROTARY_BASE ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angle = torch.outer(torch.arange(block_size, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels by its position's angle. x: (B, nh, T, hs); cos, sin: (T, hs / 2)."""
    # The product of a query turned by m and a key turned by n depends on m - n alone, so a pattern learnt at one place holds at all.
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)  # (B, nh, T, hs)


def split_heads(qkv: Tensor, n_head: int, qk_norm: bool, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, nh, T, hs) from (B, T, 3C); queries and keys normalised and turned by their positions, if wanted."""
    B, T, width = qkv.shape
    head_size = width // (3 * n_head)
    if not qkv.is_cuda and qkv.itemsize == 2:
        # On a CPU attention in 16 bits takes three times as long, forwards and backwards.
        qkv = qkv.float()
    if rotary is not None and qk_norm and has_kernels(qkv, head_size):
        from gptcore.models.kernels import rotate_heads

        return rotate_heads(qkv, *rotary, n_head)  # what follows here, in one kernel
    q, k, v = qkv.view(B, T, 3, n_head, head_size).permute(2, 0, 3, 1, 4).unbind(0)
    if qk_norm:
        # Keeps the scores within ±√hs, so a large learning rate cannot saturate the softmax (Henry et al. 2020).
        q, k = rms_norm(q), rms_norm(k)
    if rotary is not None:
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
    return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """softmax(q kᵀ / √hs) v (Vaswani et al. 2017, equation 1), as each device does it fastest: (B, nh, T, hs).

    q: (B, nh, T, hs); k, v: (B, nh, S, hs). mask: which keys each query sees, (T, S); None: itself and those before it.
    """
    T = q.size(2)
    if T == 1 and q.is_cuda and q.itemsize == 4 and not dropout_p:
        return attend_once(q, k, v, mask)
    # Autocast would take the queries of a CPU back to the 16 bits that `split_heads` has just left.
    is_taken_back = not q.is_cuda and torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", enabled=False) if is_taken_back else nullcontext():
        # Never the whole (T, S) scores in memory: torch's kernels go through them in tiles (FlashAttention, Dao et al. 2022).
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, dropout_p=dropout_p)


def attend_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one query a head, (B, nh, 1, hs), over keys and values (B, nh, S, hs), written out. mask: what it sees, (1, S).

    On a GPU torch's kernel for float32 leaves all keys of a head to one of its hundred processors, which for one token is most of a
    step of decoding; two products spread over all of them.
    """
    # A product of hs independent numbers of variance 1 has variance hs; divided by √hs it has 1 again. Larger scores would send nearly
    # all weight to one key, and there the softmax has no gradient.
    scores = q @ k.transpose(-2, -1) * q.size(-1) ** -0.5  # (B, nh, 1, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))  # a weight of exactly 0
    return scores.softmax(-1) @ v


def has_kernels(qkv: Tensor, head_size: int) -> bool:
    """Whether `kernels.rotate_heads` takes it: in 16 bits on a GPU with Triton, heads a power of two wide."""
    return HAS_TRITON and qkv.is_cuda and qkv.itemsize == 2 and head_size & (head_size - 1) == 0


def relu_squared(x: Tensor) -> Tensor:
    """ReLU² (So et al. 2021)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    # GPT-2's form, an approximation that its weights were learnt with (Hendrycks & Gimpel 2016).
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": relu_squared,
}


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products on `x`'s device are computed in at this moment: autocast's type, or x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

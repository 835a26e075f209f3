"""Float weights → the nearest numbers that few bits can say. All scales are bfloat16 before anything is rounded with them, since
that is what the kernels read: a scale rounded afterwards would be off for a whole row at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptcore.models.quantized import BF16, E4M3

# Shares of a group's largest weight that may become the end of the range: clipping one weight can serve the other 31.
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
ROWS_AT_ONCE = 4096  # of a large table, so that the candidates' errors stay small in memory


def bf16_at_least(scale: Tensor) -> Tensor:
    """`scale` in bfloat16, rounded up, so that the largest weight stays in range."""
    rounded = scale.to(BF16)
    up = (rounded.view(torch.int16) + 1).view(BF16)  # the next number away from zero
    return torch.where(rounded.float() < scale, up, rounded)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 by row. weight: (rows, columns); returns int8 of the same shape and bfloat16 scales (rows,)."""
    scale = bf16_at_least(weight.abs().amax(1).float().clamp_min(1e-12) / 127)
    return (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def quantize_rows_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 by row: bytes of the same shape and bfloat16 scales (rows,)."""
    scale = bf16_at_least(weight.abs().amax(1).float().clamp_min(1e-12) / torch.finfo(E4M3).max)
    return (weight / scale.float()[:, None]).to(E4M3).view(torch.uint8), scale


def group_scales(groups: Tensor) -> Tensor:
    """For each group of weights (…, group_size) the scale, of those tried, with the least squared error: bfloat16 (…,).

    The weight that is largest in magnitude goes to -8, the end that reaches further, so a scale may be negative.
    """
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    largest = torch.where(largest.abs() < 1e-12, torch.full_like(largest, 1e-12), largest)
    best_scale, best_error = torch.empty(0), torch.empty(0)
    for share in SHRINK:
        scale = (largest * (share / -8)).to(BF16)
        error = (fake_quantize(groups, scale) - groups).square().sum(-1)
        if share == SHRINK[0]:
            best_scale, best_error = scale, error
        else:
            is_better = error < best_error
            best_scale, best_error = torch.where(is_better, scale, best_scale), torch.minimum(error, best_error)
    return best_scale


def round_to_int4(groups: Tensor, scale: Tensor) -> Tensor:
    """q in 0…15 as float, for groups (…, group_size) and their scales (…,)."""
    return (groups / scale.float()[..., None]).round().clamp(-8, 7) + 8


def fake_quantize(groups: Tensor, scale: Tensor) -> Tensor:
    """What int4 makes of the weights, as floats of the same shape."""
    return (round_to_int4(groups, scale) - 8) * scale.float()[..., None]


def quantize_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Round-to-nearest int4. weight: (rows, columns); returns q (rows, columns) uint8 in 0…15, scales (rows, groups) bfloat16."""
    q, scales = [], []
    for rows in weight.float().split(ROWS_AT_ONCE):
        groups = rows.unflatten(1, (-1, group_size))  # (rows, groups, group_size)
        scale = group_scales(groups)
        q.append(round_to_int4(groups, scale).flatten(1).to(torch.uint8))
        scales.append(scale)
    return torch.cat(q), torch.cat(scales)


def pack_pairs(q: Tensor) -> Tensor:
    """(rows, columns) in 0…15 → (rows, columns / 2) bytes, the first of two in the upper half."""
    return (q[:, ::2] << 4) | q[:, 1::2]

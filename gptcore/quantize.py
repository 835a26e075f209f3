"""Room 11: eight bits instead of thirty-two. Weight-only int8, one scale for each output channel.

The largest weight of a row becomes 127, so the error of any weight is at most half a step of its own row (Dettmers et al.
2022 describe the family). Arithmetic stays floating point: a matrix read from memory at a quarter of the bytes is
what can make decoding faster, and only where reading is the limit.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.models import LanguageModel

FEW_ROWS = (
    4  # up to here the packed CPU kernel reads the weights once; beyond, a matrix product on unpacked weights wins
)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 by row. weight: (rows, columns); returns int8 of the same shape and float32 scales (rows,)."""
    scale = weight.abs().amax(1).clamp_min(1e-12) / 127
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale.float()


class Int8Linear(nn.Module):
    """A linear layer whose weights are stored as int8; a bias stays as it is."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.size(-1)
        if not x.is_cuda and rows <= FEW_ROWS:
            flat = x.reshape(rows, -1).bfloat16()
            y = torch.ops.aten._weight_int8pack_mm(flat, self.weight, self.scale.bfloat16())
            y = y.to(x.dtype).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype)[:, None], self.bias)


def quantize_int8(model: LanguageModel) -> LanguageModel:
    """A copy of the model with every linear layer in int8, the head included; embeddings stay as they are."""
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
    return model

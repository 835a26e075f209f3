"""Matrix products in eight bits (Micikevicius et al. 2022), for GPUs from compute capability 8.9 on.

Weights and activations are rounded to e4m3, gradients to e5m2 (more range, fewer digits), each tensor with one scale that is
recomputed every time, so there is nothing to calibrate. Products are accumulated in float32 and come back in bfloat16.
Sizes must be multiples of 16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def to_fp8(x: Tensor, dtype: torch.dtype, bound: float | None = None) -> tuple[Tensor, Tensor]:
    """x rounded to `dtype`, its largest value at the end of the range, and the float32 factor that takes it back.

    bound: what no value can exceed, where that is known; then the largest one has not to be searched for.
    """
    # A number of 8 bits has so little range that gradients, which are all small, would round to 0: each tensor is stretched to
    # it.
    end = torch.finfo(dtype).max
    if bound is None:
        scale = x.abs().amax().float().clamp_min(1e-12) / end
    else:
        scale = torch.full((), bound / end, device=x.device)
    return (x.float() / scale).to(dtype), scale


def scaled_matmul(a8: Tensor, b8: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    """`(a8 * a_scale) @ (b8 * b_scale).T`: both row-major (M, K) and (N, K), as the hardware wants them.

    Sums are kept in fewer digits than float32's between partial products ("fast accumulation"): a tenth faster, and
    benchmarks/quality.py sees no harm.
    """
    return torch._scaled_mm(a8, b8.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16, use_fast_accum=True)


class _Fp8Product(torch.autograd.Function):
    """y = x @ weight.T, forward and both gradients in eight bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bound: float | None) -> Tensor:
        x8, x_scale = to_fp8(x, E4M3, bound)
        w8, w_scale = to_fp8(weight, E4M3)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        return scaled_matmul(x8, w8, x_scale, w_scale)  # (M, N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = to_fp8(grads[0], E5M2)  # (M, N)
        # The hardware multiplies rows by rows, so each product needs its factors in that order.
        grad_x = scaled_matmul(g8, w8.t().contiguous(), g_scale, w_scale)  # (M, K)
        grad_w = scaled_matmul(g8.t().contiguous(), x8.t().contiguous(), g_scale, x_scale)  # (N, K)
        # In float32, as gradients of micro-steps are added up.
        return grad_x, grad_w.float(), None


class Fp8Linear(nn.Linear):
    """A linear layer whose products are in eight bits while training, where the number of tokens is a multiple of 16.

    input_bound: of its input's values, where one is known.
    """

    input_bound: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        if not self.training or len(flat) % 16:
            return super().forward(x)
        y = _Fp8Product.apply(flat.bfloat16(), self.weight, self.input_bound).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def use_fp8(model: nn.Module, norm_bound: float | None = None) -> int:
    """Turn the block's linear layers of sizes that are multiples of 16 into Fp8Linear, in place; how many.

    norm_bound: of what a block's norms hand to its first layers, `c_attn` and `c_fc`. A head has a class and a way of its own.
    """
    count = 0
    for name, module in model.named_modules():
        # Not a head: there rounding costs most, and its loss in pieces has products of its own.
        if type(module) is nn.Linear and not (module.in_features % 16 or module.out_features % 16):
            module.__class__ = Fp8Linear  # the same parameters under the same names, another product
            if name.endswith(("c_attn", "c_fc")):
                module.input_bound = norm_bound  # type: ignore[assignment]
            count += 1
    return count

"""From hidden states to nats without the whole batch's logits in float32: head and cross-entropy in one, piece by piece.

At a vocabulary of 50,000 the logits of a batch are by far its largest tensor. Here a piece of them is made, turned into its
loss and at once into its gradient, and dropped (the idea of Cut Cross-Entropy, Wijmans et al. 2024, and of Liger's kernels,
with plain matrix products).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore.models.fp8 import E4M3, E5M2, scaled_matmul, to_fp8
from gptcore.models.layers import HAS_TRITON

# Logits of one piece, at most; 2^27 are 512 MiB in float32. Larger pieces on a GPU: each adds to the whole weight gradient once.
# A batch with fewer takes the plain way, which is faster there.
PIECE_LOGITS = {"cpu": 1 << 27, "cuda": 1 << 29}


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Nats per target token in float32 (float64 stays float64); targets of -1 count neither in the sum nor in the mean."""
    # exp and the sum over 50,000 tokens in 16 bits would be off in the second digit of the loss; the products before it may be
    # short, this may not.
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)
    return loss.view_as(targets) if reduction == "none" else loss


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Bend logits to stay within ±cap (Gemma 2, 2024); 0 leaves them alone."""
    # A network that is sure of itself lets logits grow without end, for ever smaller gains. The cap ends that smoothly: small
    # logits pass as they are, and the slope is never quite 0.
    return cap * torch.tanh(logits / cap) if cap else logits


def head_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean", cap: float = 0.0, use_fp8: bool = False
) -> Tensor:
    """`cross_entropy(soft_cap(x @ weight.T), targets)` in pieces. x: (B, T, C), weight: (V, C), targets: (B, T)."""
    if reduction == "none":
        return piecewise_cross_entropy(x, lambda part: soft_cap(F.linear(part, weight), cap), targets, reduction, len(weight))
    loss = _HeadCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), cap, use_fp8)
    return loss / (targets >= 0).sum() if reduction == "mean" else loss


def piecewise_cross_entropy(
    x: Tensor, logits: Callable[[Tensor], Tensor], targets: Tensor, reduction: str, vocab_size: int
) -> Tensor:
    """`cross_entropy(logits(x), targets)` for any head, its gradient not in pieces: for evaluation."""
    rows = max(1, PIECE_LOGITS[x.device.type] // vocab_size)
    pieces = [
        cross_entropy(logits(part)[None], part_targets[None], "none")[0]
        for part, part_targets in zip(x.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    ]
    # Nats a token first, the sum last: so pieces change no more than rounding.
    each = torch.cat(pieces).view_as(targets)
    if reduction == "none":
        return each
    return each.sum() / (targets >= 0).sum() if reduction == "mean" else each.sum()


class _Head:
    """Loss and both gradients of some rows, in the weight's type. weight: (V, C)."""

    def __init__(self, weight: Tensor, cap: float) -> None:
        self.weight, self.cap = weight, cap

    def loss_and_gradients(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Summed nats, the gradients of x, (rows, C), and of the weight, (V, C)."""
        logits = (x @ self.weight.T).float()  # (rows, V)
        loss, grad = loss_and_gradient(logits, targets, self.cap)
        # Softmax and loss were in float32; the two large products need no more digits than the one forwards.
        grad = grad.to(x.dtype)  # (rows, V)
        return loss, grad @ self.weight, grad.T @ x


class _Fp8Head:
    """The same with products in eight bits, for a multiple of 16 rows. A logit's gradient lies within ±1: its scale needs no search."""

    def __init__(self, weight: Tensor, cap: float) -> None:
        self.cap = cap
        self.weight, self.scale = to_fp8(weight, E4M3)
        # The hardware multiplies rows by rows only, so both orders are there once a step instead of once a piece.
        self.transposed = self.weight.t().contiguous()  # (C, V)
        self.grad_scale = torch.full((), 1 / torch.finfo(E5M2).max, device=weight.device)

    def loss_and_gradients(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x8, scale = to_fp8(x, E4M3)
        logits = scaled_matmul(x8, self.weight, scale, self.scale)  # (rows, V)
        if HAS_TRITON and logits.is_cuda:
            from gptcore.models.kernels import loss_and_gradient_fp8, transpose_bytes

            loss, g8 = loss_and_gradient_fp8(logits, targets, self.cap)  # the plain code below, in less time
            transposed = transpose_bytes(g8)
        else:
            loss, grad = loss_and_gradient(logits.float(), targets, self.cap)
            g8 = (grad * torch.finfo(E5M2).max).to(E5M2)  # (rows, V)
            transposed = g8.t().contiguous()
        grad_x = scaled_matmul(g8, self.transposed, self.grad_scale, self.scale)
        grad_w = scaled_matmul(transposed, x8.t().contiguous(), self.grad_scale, scale)
        return loss, grad_x, grad_w


class _HeadCrossEntropy(torch.autograd.Function):
    """The summed loss. Gradients are made in the forward pass, while a piece's logits are at hand, so none is made twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, cap: float, use_fp8: bool) -> Tensor:
        head = _Fp8Head(weight, cap) if use_fp8 and len(x) % 16 == 0 else _Head(weight.to(x.dtype), cap)
        # Summed over pieces, so never in the 16 bits that a weight gathered by FSDP2 has.
        grad_w = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        # What is kept for the backward pass is as large as x and the weight; the logits would be V / C times x: at GPT-2's size
        # 65 times.
        grad_x = torch.empty_like(x)
        loss = torch.zeros((), device=x.device)
        # Sixteens of rows, as products in eight bits want them.
        rows = max(16, PIECE_LOGITS[x.device.type] // len(weight) // 16 * 16)
        for start in range(0, len(x), rows):
            piece = slice(start, start + rows)
            part_loss, grad_x[piece], part_grad_w = head.loss_and_gradients(x[piece], targets[piece])
            loss, grad_w = loss + part_loss, grad_w.add_(part_grad_w)
        ctx.save_for_backward(grad_x, grad_w.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_w = ctx.saved_tensors
        # The gradients are those of the plain sum; what stands above it, a mean or a loss scale, is one factor.
        return grad_x * grads[0].to(grad_x.dtype), grad_w * grads[0], None, None, None


def loss_and_gradient(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Summed nats of (rows, V) float32 logits before the cap, and their gradient; a target of -1 gives 0 for both."""
    capped = soft_cap(logits, cap)
    is_target = targets >= 0
    # logsumexp takes the largest logit out first: exp of a logit above 88 is no number in float32.
    log_z = capped.logsumexp(1, keepdim=True)  # (rows, 1)
    nats = (log_z - capped.gather(1, targets.clamp_min(0)[:, None]))[:, 0]
    is_hit = torch.arange(logits.size(1), device=logits.device) == targets[:, None]  # (rows, V); a compiler fuses it away
    # The gradient of cross-entropy by the logits: what was predicted minus what came, softmax - one-hot.
    grad = torch.where(is_target[:, None], (capped - log_z).exp() - is_hit.float(), 0.0)
    if cap:
        # Slope of the cap: tanh' = 1 - tanh².
        grad = grad * (1 - (capped / cap).square())
    return torch.where(is_target, nats, 0.0).sum(), grad

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

from gptcore.models.fp8 import matmul_fp8

# Logits of one piece, at most; 2^27 are 512 MiB in float32. Larger pieces on a GPU: each adds to the whole weight gradient once.
# A batch with fewer takes the plain way, which is faster there.
PIECE_LOGITS = {"cpu": 1 << 27, "cuda": 1 << 29}


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Nats per target token in float32 (float64 stays float64); targets of -1 count neither in the sum nor in the mean."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)
    return loss.view_as(targets) if reduction == "none" else loss


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Bend logits to stay within ±cap (Gemma 2, 2024); 0 leaves them alone."""
    return cap * torch.tanh(logits / cap) if cap else logits


def head_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean", cap: float = 0.0, use_fp8: bool = False
) -> Tensor:
    """`cross_entropy(soft_cap(x @ weight.T), targets)` in pieces. x: (B, T, C), weight: (V, C), targets: (B, T)."""
    if reduction == "none":
        return piecewise_cross_entropy(x, lambda part: F.linear(part, weight), targets, reduction, cap, len(weight))
    loss = _HeadCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), cap, use_fp8)
    return loss / (targets >= 0).sum() if reduction == "mean" else loss


def piecewise_cross_entropy(
    x: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, reduction: str, cap: float, vocab_size: int
) -> Tensor:
    """`cross_entropy(soft_cap(head(x)), targets)` for any head and without its gradient in pieces: for evaluation."""
    rows = max(1, PIECE_LOGITS[x.device.type] // vocab_size)
    pieces = [
        cross_entropy(soft_cap(head(part), cap)[None], part_targets[None], "none")[0]
        for part, part_targets in zip(x.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    ]
    each = torch.cat(pieces).view_as(targets)
    if reduction == "none":
        return each
    return each.sum() / (targets >= 0).sum() if reduction == "mean" else each.sum()


class _HeadCrossEntropy(torch.autograd.Function):
    """The summed loss. Gradients are made in the forward pass, while a piece's logits are at hand, so none is made twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, cap: float, use_fp8: bool) -> Tensor:
        w = weight.to(x.dtype)
        # Summed over pieces, so never in the 16 bits that a weight gathered by FSDP2 has.
        grad_x, grad_w = (
            torch.empty_like(x),
            torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)),
        )
        loss = torch.zeros((), device=x.device)
        rows = max(16, PIECE_LOGITS[x.device.type] // len(weight) // 16 * 16)
        for start in range(0, len(x), rows):
            part, part_targets = x[start : start + rows], targets[start : start + rows]
            logits = (matmul_fp8(part, w) if use_fp8 else part @ w.T).float()  # (rows, V)
            part_loss, grad = loss_and_gradient(logits, part_targets, cap)
            loss = loss + part_loss
            grad = grad.to(x.dtype)  # (rows, V)
            grad_x[start : start + rows] = grad @ w
            grad_w += grad.T @ part
        ctx.save_for_backward(grad_x, grad_w.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grads[0].to(grad_x.dtype), grad_w * grads[0], None, None, None


def loss_and_gradient(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Summed nats of (rows, V) float32 logits before the cap, and their gradient; a target of -1 gives 0 for both."""
    capped = soft_cap(logits, cap)
    is_target = targets >= 0
    log_z = capped.logsumexp(1, keepdim=True)  # (rows, 1)
    nats = (log_z - capped.gather(1, targets.clamp_min(0)[:, None]))[:, 0]
    is_hit = (
        torch.arange(logits.size(1), device=logits.device) == targets[:, None]
    )  # (rows, V); a compiler fuses it away
    grad = torch.where(is_target[:, None], (capped - log_z).exp() - is_hit.float(), 0.0)
    if cap:
        grad = grad * (1 - (capped / cap).square())
    return torch.where(is_target, nats, 0.0).sum(), grad

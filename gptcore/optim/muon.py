"""Muon (Jordan et al. 2024): momentum whose every update is made orthogonal, for matrices inside the network.

The step of a matrix is the nearest orthogonal matrix to its momentum, so all directions move equally far. It is found
with five Newton–Schulz iterations, which are matrix products only; matrices of one shape are stacked into one batch. Of several
processes each makes its share of a stack orthogonal, and no matrix is done twice (gptcore/optim/sharing.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gptcore.optim.sharing import in_turns, share_out
from gptcore.ranks import ALONE, Ranks

# Of p(s) = a·s + b·s³ + c·s⁵, which each step applies to every singular value s and to nothing else. The classical coefficients
# (15/8, -10/8, 3/8) go to exactly 1, but a small s grows by less than 2 a step; these have the slope 3.44 at 0, so that five
# steps lift even s = 0.003, and leave s somewhere in about [0.7, 1.2], which training does not notice (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
MOMENTUM = 0.95


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Replace each matrix's singular values by about 1. matrices: (..., rows, columns), any leading shape; dtype: of the products."""
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype)
    # G = x·xᵀ is a square of the rows: of a tall matrix the transpose has the smaller one, and the same singular values.
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    # The iteration diverges for singular values above 1.26. The Frobenius norm bounds the largest and costs one pass; the
    # largest itself would cost an iteration of its own.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.reshape(-1, *x.shape[-2:])
    # x ← a·x + (b·G + c·G²)·x with G = x·xᵀ, that is p of each singular value without ever finding one: with x = U·S·Vᵀ, G is
    # U·S²·Uᵀ. Three products, the sums within them: what GPUs are fastest at, and safe in 16 bits, where an SVD is neither.
    for _ in range(STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum and orthogonalised updates.

    A parameter group may carry `splits`: how many matrices are stacked in each parameter's rows (3 for fused query, key and
    value), each made orthogonal on its own. Updates are scaled by sqrt(max(1, rows / columns)), so that one learning rate
    serves all shapes.
    """

    def __init__(
        self,
        groups: list[dict[str, object]],
        lr: float,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
        ranks: Ranks = ALONE,
        rows: dict[Tensor, int] | None = None,
    ) -> None:
        """dtype: of the products that make an update orthogonal; bfloat16 is enough, where it is fast.

        ranks: the processes that share the work. rows: of each whole matrix, where parameters are this process's rows of them.
        """
        self.dtype, self.ranks, self.rows = dtype, ranks, rows
        # As in torch's fused AdamW: where it is not 0, a step changes neither parameters nor momentum.
        self.found_inf: Tensor | None = None
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "splits": 1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        in_turns(self._step_stack(group, *stack) for group in self.param_groups for stack in self._stacks(group))

    def _stacks(self, group: dict[str, Any]) -> Iterator[tuple[int, int, list[Tensor]]]:
        """Rows and columns of whole matrices, and the parameters that are such matrices (or rows of them)."""
        by_shape: dict[tuple[int, int], list[Tensor]] = {}
        for parameter in group["params"]:
            assert parameter.grad is not None, f"a matrix of shape {tuple(parameter.shape)} got no gradient"
            rows = len(parameter) if self.rows is None else self.rows[parameter]
            by_shape.setdefault((rows, parameter.size(1)), []).append(parameter)
        for (rows, columns), parameters in by_shape.items():
            yield rows, columns, parameters

    def _step_stack(self, group: dict[str, Any], rows: int, columns: int, parameters: list[Tensor]) -> Iterator[None]:
        """One update of a stack; pauses where other processes have to be heard."""
        # One batch of products for all matrices of a shape: a GPU would idle on each alone.
        grads = torch.stack([p.grad for p in parameters if p.grad is not None])
        for parameter in parameters:
            self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        if self.found_inf is not None:  # momentum drawn towards itself stays as it is
            grads = torch.where(self.found_inf > 0, torch.stack(buffers), grads)
        torch._foreach_lerp_(buffers, list(grads.unbind()), 1 - MOMENTUM)
        # Nesterov's look ahead (Sutskever et al. 2013): the gradient counts once more than in the momentum, so the step already
        # knows of the newest turn. Means, not sums, as orthogonalising forgets every factor.
        update = grads.lerp_(torch.stack(buffers), MOMENTUM)  # (n, rows or this process's, columns), Nesterov
        # Query, key and value are three matrices that happen to lie in one parameter: made orthogonal together, they would have
        # to share one set of directions.
        splits = int(group["splits"])

        def orthogonal(matrices: Tensor) -> Tensor:
            parts = matrices.view(-1, splits, rows // splits, columns)
            return orthogonalize(parts, dtype=self.dtype).view(-1, rows, columns)

        update = yield from share_out(update, rows, orthogonal, self.dtype, self.ranks, is_spread=self.rows is not None)
        # An orthogonal (rows, columns) matrix has entries of size 1/√max(rows, columns). With √(rows / columns) for tall ones a
        # step changes an output by the same amount whatever the shape, so one learning rate serves all (Bernstein & Newhouse
        # 2024).
        scale, lr = max(1.0, rows // splits / columns) ** 0.5, group["lr"]
        # Arithmetic instead of a branch: a recorded CUDA graph cannot decide, and asking the device would stop it.
        if self.found_inf is not None:
            lr = lr * (1 - self.found_inf)
        # Decoupled decay (Loshchilov & Hutter 2019): on the weights themselves, as in the gradient the orthogonalising would
        # lose its size.
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        # `alpha` has to be a number of Python's; a learning rate on the device is multiplied instead.
        if isinstance(lr, Tensor):
            torch._foreach_add_(parameters, list((update * (-lr * scale)).unbind()))
        else:
            torch._foreach_add_(parameters, list(update.unbind()), alpha=-lr * scale)

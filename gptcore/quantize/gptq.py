"""GPTQ (Frantar et al. 2022): round a matrix column by column, and let the columns still to come make up for each error.

What a layer does to its inputs X is W X; the squared change of that under rounding is a quadratic form in H = X X^T. The inputs come
from a calibration set, through the layers already rounded, so later layers also make up for earlier ones.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from gptcore.models import LanguageModel
from gptcore.quantize.rounding import group_scales, round_to_int4

DAMPING = 0.01  # of the mean diagonal, added to it: directions that the calibration set never showed
BATCH_SIZE = 16  # windows of the calibration set in one forward pass
BLOCK = 128  # columns whose updates to the rest of the matrix are made in one product


@torch.no_grad()
def collect_hessians(model: LanguageModel, layers: dict[str, nn.Linear], calibration: Tensor) -> dict[str, Tensor]:
    """X X^T of each layer's inputs over calibration ids (n, T). Each (in_features, in_features) float32."""
    hessians: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        flat = x.flatten(0, -2).float()
        hessians[name] += flat.T @ flat

    with ExitStack() as stack:
        for name, layer in layers.items():
            hessians[name] = torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)
            stack.enter_context(layer.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0])))
        for idx in calibration.split(BATCH_SIZE):
            model(idx)
    return hessians


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped H, in float64: row i says how later columns make up for column i."""
    H = hessian.double()
    dead = H.diagonal() <= 0  # an input that was always zero
    H.diagonal()[dead] = 1.0
    H.diagonal().add_(DAMPING * H.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    return torch.linalg.cholesky(inverse, upper=True)


def gptq_groups(weight: Tensor, hessian: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Like `quantize_groups`, with the error of each column spread over those after it.

    weight: (rows, columns), hessian: (columns, columns); returns q (rows, columns) uint8 in 0…15 and scales (rows, groups) bfloat16.
    """
    W = weight.detach().float().clone()
    rows, columns = W.shape
    U = inverse_factor(hessian).float()
    q = torch.zeros(rows, columns, dtype=torch.uint8, device=W.device)
    scales = torch.zeros(rows, columns // group_size, dtype=torch.bfloat16, device=W.device)
    width = max(BLOCK, group_size)
    for start in range(0, columns, width):
        end = min(start + width, columns)
        errors = torch.zeros(rows, end - start, device=W.device)
        for column in range(start, end):
            if column % group_size == 0:  # of the weights as they are now, earlier errors included
                scales[:, column // group_size] = group_scales(W[:, column : column + group_size])
            scale = scales[:, column // group_size]
            digit = round_to_int4(W[:, column, None], scale)  # (rows, 1)
            q[:, column] = digit[:, 0].to(torch.uint8)
            errors[:, column - start] = (W[:, column] - (digit[:, 0] - 8) * scale.float()) / U[column, column]
            W[:, column:end] -= torch.outer(errors[:, column - start], U[column, column:end])
        W[:, end:] -= errors @ U[start:end, end:]
    return q, scales

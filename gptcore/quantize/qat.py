"""Fine-tuning that feels the rounding (quantization-aware training): every forward pass rounds the weights to int4, the gradient
passes through as if it had not (the straight-through estimator, Bengio et al. 2013; Jacob et al. 2018 for whole networks).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.config import ExperimentConfig, with_changes
from gptcore.models import LanguageModel
from gptcore.models.head import LinearHead
from gptcore.models.quantized import fits_int4
from gptcore.quantize.rounding import fake_quantize, group_scales
from gptcore.shards import ShardSet
from gptcore.train import build_trainer, train_step

LR_SHARE = 0.1  # of the run's learning rates: the weights are to settle beside grid points, not to travel


class _StraightThrough(torch.autograd.Function):
    """int4 forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, group_size: int) -> Tensor:
        groups = weight.float().unflatten(1, (-1, group_size))
        return fake_quantize(groups, group_scales(groups)).flatten(1).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class FakeInt4Linear(nn.Linear):
    """A linear layer that multiplies with what int4 would make of its weights."""

    group_size: int

    def product_weight(self) -> Tensor:
        return _StraightThrough.apply(self.weight, self.group_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.product_weight(), self.bias)


class FakeInt4Head(FakeInt4Linear, LinearHead):
    """The same at the end of a model."""


ROUNDED: dict[type[nn.Module], type[FakeInt4Linear]] = {nn.Linear: FakeInt4Linear, LinearHead: FakeInt4Head}


def feel_int4(model: LanguageModel, group_size: int) -> int:
    """Turn the linear layers that int4 fits into FakeInt4Linear, in place: the same parameters under the same names. How many."""
    count = 0
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module) in ROUNDED and fits_int4(module.in_features, group_size):
            module.__class__ = ROUNDED[type(module)]
            module.group_size = group_size  # type: ignore[assignment]
            count += 1
    return count


def fine_tune(
    weights: dict[str, Tensor], config: ExperimentConfig, shards: ShardSet, steps: int, group_size: int
) -> LanguageModel:
    """The model of a checkpoint after `steps` further steps on the training split with rounded weights, ready to be rounded.

    Its learning rates are a tenth of the run's and fall to zero; batches are the run's, from seed + 1. A run in fp8 goes on in the
    device's 16 bits: products of its own would round the rounded weights again.
    """
    train = config.train
    changes = {
        "init_from": None,  # where the run itself began, and that may be gone
        "precision": "auto" if train.precision == "fp8" else train.precision,
        "max_steps": steps,
        "max_tokens": None,
        "minutes": None,
        "seed": train.seed + 1,
        "lr": train.lr * LR_SHARE,
        "adamw_lr": train.adamw_lr * LR_SHARE,
        "min_lr": 0.0,
        "schedule": "linear",
        "warmup_steps": min(10, steps),
        "ema_decay": 0.0,
        "compile": "off",
        "cuda_graph": "off",
    }
    trainer = build_trainer(with_changes(config, train=changes), shards)
    trainer.model.load_weights(weights)
    assert feel_int4(trainer.model, group_size), "no linear layer fits int4"
    for _ in range(steps):
        train_step(trainer)
    trainer.watch.check(trainer.step, train.lr)
    for module in trainer.model.modules():
        if isinstance(module, FakeInt4Linear):
            module.__class__ = next(exact for exact, rounded in ROUNDED.items() if rounded is type(module))  # type: ignore[assignment]
    return trainer.model.eval()

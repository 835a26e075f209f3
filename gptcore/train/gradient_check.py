"""A check that a run's micro-steps add up: the gradient of a few of its own sequences at once, and in two micro-steps.

Made once before step 0, without dropout; nothing is learnt and no random number is used up. In the run's own precision, but for
fp8 in bf16: evaluation mode, which turns dropout off, turns products in 8 bits off too. The full measurement is the
accumulation study.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcore.ranks import ALONE, Ranks
from gptcore.store import write_json
from gptcore.train.distribute import uncompiled
from gptcore.train.step import next_batch
from gptcore.train.trainer import Trainer

log = logging.getLogger(__name__)

FILE_NAME = "accumulation.json"
SEQUENCES = 4
# Largest relative distance that rounding explains. The accumulation study saw 1e-7 in fp32 and 2e-3 in bf16; the others follow
# from their mantissas (tf32 and fp16 have 3 bits more than bf16).
LIMITS = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}


def check_gradient(trainer: Trainer) -> dict[str, Any] | None:
    """{error, limit, passed, sequences, targets, precision, seconds}; error is |g2 - g1| / |g1|, g1 of all sequences at once.

    None where a forward pass holds a single sequence: it cannot be split. Uses the run's first sequences; gradients are cleared.
    Where the model is spread over processes, all of them have to call it, and it is about the sequences of all.
    """
    start = time.perf_counter()
    x, y = next_batch(trainer)
    count = min(SEQUENCES, trainer.micro_batch_size, len(x)) // 2 * 2
    if count < 2:
        return None
    x, y = x[:count], y[:count]
    with _without_dropout(trainer), uncompiled(trainer.model):
        whole = _gradient(trainer, x, y, count)
        halves = _gradient(trainer, x, y, count // 2)
    trainer.optimizers.zero_grad()
    ranks = trainer.ranks if trainer.is_spread else ALONE
    norm, gap = _length(whole, ranks), _length([a - b for a, b in zip(whole, halves, strict=True)], ranks)
    # A model in evaluation mode has no products in 8 bits (gptcore.models.fp8).
    precision = "bf16" if trainer.device.precision == "fp8" else trainer.device.precision
    error, limit = gap / norm if norm else 0.0, LIMITS[precision]
    return {
        "error": error,
        "limit": limit,
        "passed": error <= limit,
        "sequences": count,
        "targets": int((y >= 0).sum()),
        "precision": precision,
        "seconds": round(time.perf_counter() - start, 4),
    }


def write_gradient_check(trainer: Trainer, out: Path) -> dict[str, Any] | None:
    """`check_gradient`, kept as `out/accumulation.json`; a run that goes on keeps the one it has. A warning where it did not pass.

    All processes call it; None for all but the first.
    """
    if trainer.step or not (trainer.ranks.is_first or trainer.is_spread):
        return None
    found = check_gradient(trainer)
    if found is None or not trainer.ranks.is_first:
        return None
    write_json(out / FILE_NAME, found, has_checksum=False)
    if not found["passed"]:
        log.warning(
            "micro-steps do not add up: the gradient of %d sequences in two micro-steps is off by %.1e, more than %.0e in %s",
            *(found[key] for key in ("sequences", "error", "limit", "precision")),
        )
    return found


def _gradient(trainer: Trainer, x: Tensor, y: Tensor, micro: int) -> list[Tensor]:
    """Sums of target losses over their number in the whole, as `backward_all` has it, but uncompiled and on this process alone."""
    trainer.optimizers.zero_grad()
    targets = (y >= 0).sum()
    for offset in range(0, len(x), micro):
        with trainer.device.autocast():
            loss = trainer.model(x[offset : offset + micro], y[offset : offset + micro], reduction="sum")[1]
        assert loss is not None
        (loss / targets).backward()
    return [p.grad.clone() for p in trainer.optimizers.collect() if p.grad is not None]


def _length(tensors: list[Tensor], ranks: Ranks) -> float:
    return float(ranks.sum_(torch.stack([t.double().square().sum() for t in tensors]).sum()).sqrt())


@contextmanager
def _without_dropout(trainer: Trainer) -> Iterator[None]:
    """Random masks differ between splits. cuDNN's recurrent layers have no backward pass without them, torch's own have."""
    trainer.model.eval()
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled and not trainer.device.is_cuda):
            yield
    finally:
        trainer.model.train()

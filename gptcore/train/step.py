"""One update of the weights: gradients of all micro-batches, clipping, the optimizer, the moving average."""

from __future__ import annotations

import logging
import math
from functools import partial

import torch
from torch import Tensor

from gptcore.errors import DeviceMemoryError
from gptcore.optim import lr_factor
from gptcore.ranks import ALONE, Ranks
from gptcore.train.distribute import exchanging
from gptcore.train.feed import to_device
from gptcore.train.graph import GraphedStep
from gptcore.train.trainer import Trainer

log = logging.getLogger(__name__)


def train_step(trainer: Trainer) -> tuple[Tensor, Tensor, float]:
    """One optimizer update: (this process's part of the mean loss, gradient norm before clipping, share of the peak learning rate).

    The gradient is the sum over target tokens divided by their number in the whole batch, whatever the micro-batch and the
    number of processes. Raises NonFinite before the update (on a GPU: makes no update, and `trainer.watch.check` raises),
    DeviceMemoryError when one sequence does not fit.
    """
    train = trainer.config.train
    fall = train.warmup_steps, train.decay_fraction, train.min_lr / train.lr
    factor = lr_factor(train.schedule, trainer.step, trainer.progress(), *fall)
    # A function of the step, or of the clock, without a scheduler's own count: a resumed run is at the right place by itself.
    trainer.optimizers.set_lr_factor(factor)
    # Read outside of what may be recorded: a CUDA graph cannot go to the shards.
    x, y = next_batch(trainer)
    if trainer.use_graph and trainer.graph is None:
        trainer.graph = GraphedStep(trainer.device.torch)
    step = partial(update, trainer)
    loss, norm = step(x, y) if trainer.graph is None else trainer.graph.run(step, x, y)
    trainer.step += 1
    return loss, norm, factor


def update(trainer: Trainer, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """All of a step that happens on the device. x, y: this process's sequences, (B, T); returns loss and gradient norm."""
    train, clock = trainer.config.train, trainer.clock
    loss = gradients_that_fit(trainer, x, y)
    with clock.phase("clip"):
        parameters = trainer.optimizers.collect()
        overflow = None
        if trainer.loss_scale is not None:
            # Before clipping: the bound is on the gradients themselves.
            trainer.loss_scale.unscale([p.grad for p in parameters if p.grad is not None])
        norm = clip(parameters, train.grad_clip, trainer.ranks if trainer.is_spread else ALONE)
        if trainer.loss_scale is not None:  # an overflow is the scale's doing, not the model's: this step is left out
            overflow = trainer.loss_scale.update(norm)
            found_inf = torch.maximum(trainer.watch.note(loss, torch.zeros_like(norm)), overflow)
        else:
            found_inf = trainer.watch.note(loss, norm)
        # A CPU's numbers are at hand; asking a GPU would make every step wait for it.
        if trainer.watch.at_once:
            trainer.watch.check(trainer.step + 1, train.lr)
    # The device itself leaves an update out: by the time anybody here knew of a bad number, a GPU would have made it.
    with clock.phase("optimizer"):
        is_certain = trainer.watch.at_once and overflow is None
        trainer.optimizers.step(None if is_certain else found_inf)
        trainer.optimizers.zero_grad()
        if trainer.average is not None:
            trainer.average.update()
    return loss, norm


def clip(parameters: list[Tensor], largest: float, ranks: Ranks) -> Tensor:
    """Scale gradients down to a norm of `largest` (0: leave them); the norm before, over all of `ranks`, each with its own rows."""
    # One norm over all parameters (Pascanu et al. 2013): the direction stays, only a step from an unusual batch becomes
    # shorter.
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if ranks.count > 1:
        # Each process holds other rows: squares add up, norms do not.
        norm = ranks.sum_(norm.square()).sqrt()
    # Clipping to infinity changes nothing, and is the same kernels: no branch on what only the device knows.
    torch.nn.utils.clip_grads_with_norm_(parameters, largest or math.inf, norm)
    return norm


def next_batch(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """This process's sequences of the next step: the order of all samples does not depend on how many processes there are."""
    local = trainer.local_batch_size
    # Arithmetic instead of a position that somebody keeps: with other ranks, or after a resume, sample i is still learnt in the
    # same step.
    start = trainer.step * trainer.config.train.global_batch_size + trainer.ranks.rank * local
    with trainer.clock.phase("data"):
        x, y = trainer.sampler.batch(start, local)
        with trainer.clock.phase("to_device"):
            return to_device(x, trainer.device), to_device(y, trainer.device)


def gradients_that_fit(trainer: Trainer, x: Tensor, y: Tensor) -> Tensor:
    """`backward_all`; when the device's memory runs out, with the micro-batch's largest divisor that is at most half."""
    while True:
        try:
            return backward_all(trainer, x, y)
        except torch.OutOfMemoryError as error:
            # The gradients of the micro-batches that did fit would be counted twice.
            trainer.optimizers.zero_grad()
            trainer.micro_batch_size = smaller_micro_batch(trainer.micro_batch_size, error, trainer.ranks)
            now, tokens = trainer.micro_batch_size, f"{trainer.tokens_per_step:,}"
            log.warning("out of device memory: train.micro_batch_size is now %d, a step stays %s tokens", now, tokens)
        # Outside of the `except`: there the error still holds what the failed pass had made.
        torch.cuda.empty_cache()


def accumulate_gradients(trainer: Trainer) -> Tensor:
    """The gradients of the next step, summed over its micro-batches; the mean loss, in nats per token."""
    return backward_all(trainer, *next_batch(trainer))


def backward_all(trainer: Trainer, x: Tensor, y: Tensor) -> Tensor:
    """Forward and backward over all micro-batches; this process's part of the batch's mean loss, in nats per token."""
    micro, device, ranks, clock = trainer.micro_batch_size, trainer.device, trainer.ranks, trainer.clock
    total = torch.zeros((), device=device.torch)
    for offset in range(0, len(x), micro):
        # Gradients add up in `.grad` on their own: micro-steps are a loop, and only the last one has to tell the other
        # processes.
        is_last = offset + micro >= len(x)
        with exchanging(trainer.forward, ranks, is_last):
            with clock.phase("forward"), device.autocast():
                part = x[offset : offset + micro], y[offset : offset + micro]
                # A sum over the global number of tokens, not a mean of the micro-batch: means of unequal parts do not add up to
                # the mean of the whole, a mistake that widely used libraries made until 2024.
                loss = trainer.forward(*part, reduction="sum")[1] / trainer.tokens_per_step
            with clock.phase("backward"):
                # DDP and FSDP2 take the mean over processes; the loss is a sum divided by the global count.
                scaled = loss * ranks.count if ranks.count > 1 else loss
                (scaled if trainer.loss_scale is None else scaled * trainer.loss_scale.scale).backward()
        # On the device, and without its graph: adding up must neither wait nor keep activations alive.
        total += loss.detach()
    return total


def smaller_micro_batch(micro: int, error: Exception, ranks: Ranks = ALONE) -> int:
    """The largest divisor that is at most half. Raises DeviceMemoryError where there is none, and with several processes: the others
    are in the middle of an exchange with this one, which cannot begin again."""
    if ranks.count > 1:
        raise DeviceMemoryError(
            f"process {ranks.rank}: out of device memory with {micro} sequences; set a smaller train.micro_batch_size"
        ) from error
    if micro == 1:
        raise DeviceMemoryError(
            "out of device memory with one sequence; lower model.block_size, model.n_embd or model.n_layer"
        ) from error
    # A divisor, so that all micro-batches have one size: another shape would be compiled anew.
    return next(m for m in range(micro // 2, 0, -1) if micro % m == 0)

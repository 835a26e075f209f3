"""What a run will take, said before it starts: parameters, FLOPs, memory, time. Arithmetic and two micro-batches of probing."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from gptcore.config import UserError
from gptcore.errors import first_line
from gptcore.timing import format_seconds, measure_ms
from gptcore.train.activations import saved_activations
from gptcore.train.distribute import put_away, uncompiled
from gptcore.train.step import backward_all, next_batch, smaller_micro_batch
from gptcore.train.trainer import Trainer, build_forward, state_mib

log = logging.getLogger(__name__)

SAFE_SHARE = 0.9  # of the free memory that an automatic micro-batch may plan to use


@dataclass(frozen=True)
class RunEstimate:
    """Of the rest of a run, on this process's device."""

    parameters: int
    flops_per_token: float
    flops: float | None  # None when the clock ends the run
    state_mib: float
    sequence_mib: float  # activations that one sequence keeps for the backward pass
    memory_mib: float
    free_mib: float
    step_ms: float
    seconds: float | None

    def line(self, device: str) -> str:
        total = f", {self.flops:.2g} in all" if self.flops is not None else ""
        time = f"about {format_seconds(self.seconds)}" if self.seconds is not None else "until the clock ends it"
        return (
            f"preflight: {self.parameters:,} parameters; {self.flops_per_token:.3g} FLOPs a token{total}; about "
            f"{self.memory_mib:,.0f} MiB of {self.free_mib:,.0f} on {device}; {self.step_ms:.0f} ms a step, {time} of training"
        )


def preflight(trainer: Trainer) -> RunEstimate:
    """RunEstimate the run, choose the micro-batch where it is `auto`, compile what is to be compiled; nothing is learnt.

    Raises UserError when not even one sequence fits into memory.
    """
    train, device = trainer.config.train, trainer.device
    parameters, state = state_mib(trainer.config, trainer.shards.vocab_size, trainer.ranks)
    rng = torch.get_rng_state(), torch.cuda.get_rng_state() if device.is_cuda else None
    x, y = next_batch(trainer)
    sequence = measure_sequence_mib(trainer, x[:1], y[:1])
    free = trainer.ranks.smallest(device.free_mib())  # one micro-batch for all processes
    fitting = int((SAFE_SHARE * free - state) // sequence) if sequence else len(x)
    if fitting < 1:
        raise UserError(
            f"one sequence of {trainer.config.model.block_size} tokens keeps {sequence:,.0f} MiB beside {state:,.0f} MiB of "
            f"weights and optimizer state, and {device.name} has {free:,.0f} MiB free; lower model.block_size, model.n_layer or model.n_embd"
        )
    if train.micro_batch_size == "auto" and trainer.micro_batch_size > fitting:
        trainer.micro_batch_size = max(m for m in range(1, fitting + 1) if len(x) % m == 0)
        log.info("train.micro_batch_size is %d: so many sequences fit into memory", trainer.micro_batch_size)
    micro_ms = probe(trainer, x, y)
    step_ms = micro_ms * (len(x) // trainer.micro_batch_size)
    steps = None if trainer.max_steps is None else trainer.max_steps - trainer.step
    seconds = None if steps is None else steps * step_ms / 1e3
    if train.minutes is not None:
        seconds = min(seconds, 60 * train.minutes) if seconds is not None else 60 * train.minutes
    torch.set_rng_state(rng[0])
    if rng[1] is not None:
        torch.cuda.set_rng_state(rng[1])
    flops_per_token = trainer.model.flops_per_token()
    return RunEstimate(
        parameters=parameters,
        flops_per_token=flops_per_token,
        flops=None if steps is None else flops_per_token * trainer.tokens_per_step * steps,
        state_mib=state,
        sequence_mib=sequence,
        memory_mib=state + trainer.micro_batch_size * sequence,
        free_mib=free,
        step_ms=step_ms,
        seconds=seconds,
    )


def measure_sequence_mib(trainer: Trainer, x: Tensor, y: Tensor) -> float:
    """MiB that autograd keeps for the backward pass of one sequence, uncompiled; parameters not counted."""
    with uncompiled(trainer.model), saved_activations(trainer.model) as saved, trainer.device.autocast():
        trainer.model(x, y, reduction="sum")
    put_away(trainer.model)
    return saved.peak_mib


def probe(trainer: Trainer, x: Tensor, y: Tensor) -> float:
    """Milliseconds of one micro-batch, forward and backward, after one that is not counted and may compile."""
    while True:
        micro = trainer.micro_batch_size
        try:
            timed = measure_ms(lambda: backward_all(trainer, x[:micro], y[:micro]), trainer.device.synchronize, 1)  # noqa: B023
            return timed.median
        except torch.OutOfMemoryError as error:
            trainer.micro_batch_size = smaller_micro_batch(micro, error, trainer.ranks)
            log.warning("out of device memory: train.micro_batch_size is now %d", trainer.micro_batch_size)
        except Exception as error:
            if not is_compiler_error(error) or trainer.config.train.compile == "off":
                raise
            log.warning("torch.compile failed (%s), so the model runs uncompiled", first_line(error))
            trainer.forward = build_forward(trainer.model, trainer.device, trainer.ranks, "off")
        finally:
            trainer.optimizers.zero_grad()


def is_compiler_error(error: Exception) -> bool:
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)

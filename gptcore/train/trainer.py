"""What a run is made of, put together before step 0 or refused with the field to change."""

from __future__ import annotations

import logging
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gptcore.batches import Sampler
from gptcore.config import ExperimentConfig, UserError
from gptcore.device import Device, choose_device, set_determinism
from gptcore.models import LanguageModel, build_model
from gptcore.models.build import MODELS
from gptcore.models.fp8 import use_fp8
from gptcore.models.gpt import GPT
from gptcore.models.rnn import RNN
from gptcore.optim import Optimizers, WeightAverage, build_optimizers
from gptcore.ranks import ALONE, Ranks
from gptcore.shards import ShardSet
from gptcore.timing import PhaseClock
from gptcore.train.distribute import compile_parts, distribute, spread, uncompile_parts
from gptcore.train.feed import build_feed
from gptcore.train.finite import FiniteWatch, LossScale
from gptcore.train.warm import load_initial_weights

log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """All that a run is made of. `step` counts optimizer updates done."""

    config: ExperimentConfig
    shards: ShardSet
    device: Device
    ranks: Ranks
    model: LanguageModel
    optimizers: Optimizers
    sampler: Sampler
    micro_batch_size: int
    forward: Any  # the model: compiled and distributed where that applies
    watch: FiniteWatch
    loss_scale: LossScale | None  # fp16 only
    average: WeightAverage | None  # with train.ema_decay
    use_graph: bool
    graph: Any = None  # the captured step, from the third step on
    step: int = 0
    seconds_before: float = 0.0  # of training, in earlier attempts of a resumed run
    started: float = field(default_factory=time.perf_counter)
    clock: PhaseClock = field(default_factory=PhaseClock)

    @property
    def local_batch_size(self) -> int:
        """Sequences of a step that this process learns from."""
        return self.config.train.global_batch_size // self.ranks.count

    @property
    def is_spread(self) -> bool:
        """Whether each process holds only its part of weights and optimizer state."""
        return spreads(self.config, self.ranks)

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.global_batch_size * self.config.model.block_size

    @property
    def tokens_seen(self) -> int:
        return self.step * self.tokens_per_step

    @property
    def max_steps(self) -> int | None:
        return self.config.train.count_steps(self.config.model.block_size)

    def elapsed_seconds(self) -> float:
        """Of this run, all attempts together; the same on every process."""
        return self.ranks.from_first(self.seconds_before + time.perf_counter() - self.started)

    def progress(self) -> float:
        """Share of the run that is over, 0 to 1, by whichever of steps, tokens and clock is furthest."""
        share = self.step / self.max_steps if self.max_steps else 0.0
        if self.config.train.minutes:
            share = max(share, self.elapsed_seconds() / (60 * self.config.train.minutes))
        return min(1.0, share)


def build_trainer(config: ExperimentConfig, shards: ShardSet, ranks: Ranks = ALONE) -> Trainer:
    """Everything in place before step 0, or a UserError that says which field to change."""
    train = config.train
    family = MODELS[config.model.family]
    if not family.is_trained:
        raise UserError(
            f"model.family={config.model.family} is counted, not trained: `gptloom study rnn` does it; choose another family"
        )
    shards.check_fits(config.model.block_size)
    if train.global_batch_size % ranks.count:
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} cannot be divided among {ranks.count} processes; use a multiple"
        )
    device = choose_device(train.device, train.precision)
    set_determinism(train.deterministic, device, is_recurrent=issubclass(family, RNN))
    check_memory(config, shards.vocab_size, device, ranks)
    use_graph = _graph_applies(config, device, ranks)
    if use_graph:
        # Autograd remembers the stream on which it first met a parameter, and the default stream cannot be recorded.
        torch.cuda.set_stream(torch.cuda.Stream(device.torch))
    torch.manual_seed(train.seed)
    model = build_model(config.model, shards.vocab_size)
    if not spreads(config, ranks):
        model.to(device.torch)
    if train.init_from:
        load_initial_weights(model, Path(train.init_from), shards)
    if spreads(config, ranks):
        spread(model, device, ranks)
    elif device.precision == "fp8":
        turn_on_fp8(model)
    if ranks.count > 1:
        torch.manual_seed(train.seed + ranks.rank)  # the same weights everywhere, but dropout of its own
    local = train.global_batch_size // ranks.count
    micro = local if train.micro_batch_size == "auto" else train.micro_batch_size
    if local % micro:
        raise UserError(f"train.micro_batch_size={micro} does not divide the {local} sequences of each process")
    return Trainer(
        config=config,
        shards=shards,
        device=device,
        ranks=ranks,
        model=model,
        optimizers=build_optimizers(model, train, on_device=use_graph, ranks=ranks),
        sampler=build_feed(config, shards, device, ranks),
        micro_batch_size=micro,
        forward=build_forward(model, device, ranks, train.compile),
        watch=FiniteWatch(device.torch, at_once=not device.is_cuda),
        loss_scale=LossScale(device.torch) if device.precision == "fp16" else None,
        average=WeightAverage(model, train.ema_decay) if train.ema_decay else None,
        use_graph=use_graph,
    )


def spreads(config: ExperimentConfig, ranks: Ranks) -> bool:
    return config.train.parallel == "fsdp" and ranks.count > 1


def state_mib(config: ExperimentConfig, vocab_size: int, ranks: Ranks = ALONE) -> tuple[int, float]:
    """Parameters, and MiB of weights, gradients, optimizer state and average on one process, without allocating any of them."""
    with torch.device("meta"):
        count = build_model(config.model, vocab_size).count_parameters()
    copies = 4 + (1 if config.train.ema_decay else 0)  # weights, gradients, AdamW's two moments (Muon has one)
    return count, copies * 4 * count / 2**20 / (ranks.count if spreads(config, ranks) else 1)


def check_memory(config: ExperimentConfig, vocab_size: int, device: Device, ranks: Ranks = ALONE) -> None:
    """Raises UserError for a model whose state alone does not fit the device."""
    parameters, needed = state_mib(config, vocab_size, ranks)
    free = device.free_mib()
    if needed > free:
        raise UserError(
            f"the model has {parameters:,} parameters: weights, gradients and optimizer state need {needed:,.0f} MiB, and "
            f"{device.name} has {free:,.0f} MiB free; lower model.n_layer={config.model.n_layer} or "
            f"model.n_embd={config.model.n_embd}, or spread it over more GPUs with train.parallel=fsdp"
        )


def turn_on_fp8(model: LanguageModel) -> None:
    """Large products in eight bits; raises UserError for a model without linear layers of fitting sizes."""
    if not isinstance(model, GPT) or not use_fp8(model, model.norm_bound()):
        raise UserError("train.precision=fp8: needs model.family=gpt with model.n_embd a multiple of 16; use bf16")
    model.lm_head.in_fp8 = not model.vocab_size % 16
    if not model.lm_head.in_fp8:
        log.info("the head stays in bf16: set model.padded_vocab_size to a multiple of 16 to have it in fp8 too")


def build_forward(model: LanguageModel, device: Device, ranks: Ranks, choice: str) -> Any:
    """The model as the step calls it: compiled where that pays and works, distributed where there are several processes."""
    forward: Any = model
    uncompile_parts(model)
    if choice == "on" or (choice == "auto" and device.is_cuda):
        lacking = missing_compiler(device)
        if lacking:
            log.warning("train.compile=%s: %s, so the model runs uncompiled", choice, lacking)
        elif ranks.count > 1 and isinstance(model, GPT):
            compile_parts(model)
        else:
            forward = torch.compile(model)
    return forward if ranks.count == 1 else distribute(model, forward)


def missing_compiler(device: Device) -> str | None:
    """What torch.compile lacks on this machine, or None."""
    if device.is_cuda:
        from torch.utils._triton import has_triton

        return None if has_triton() else "there is no Triton here"
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return None if any(map(shutil.which, names)) else f"there is no C++ compiler here ({' or '.join(names)})"


def _graph_applies(config: ExperimentConfig, device: Device, ranks: Ranks) -> bool:
    if config.train.cuda_graph == "off":
        return False
    if not device.is_cuda or ranks.count > 1:
        raise UserError("train.cuda_graph=on: needs one process on one CUDA GPU; use train.cuda_graph=off")
    return True

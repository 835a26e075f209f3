"""Room 9: the loop that drives all the rooms below it, and the process entry point.

    python -m gptcore.train experiments/smoke.yaml [section.field=value …]
    python -m gptcore.train CONFIG.yaml --shards DIR --out DIR

Needs torch, numpy, pydantic, PyYAML and safetensors only. Without --shards it first makes them from `data.source`, which
also takes pyarrow (and finds them again the next time). A run that was stopped goes on from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcore.batches import Sampler, build_sampler
from gptcore.checkpoint import list_checkpoints, load_checkpoint, load_optimizer_tensors, save_checkpoint
from gptcore.config import ExperimentConfig, UserError, dump_yaml, flatten, load_config
from gptcore.device import Device, choose_device, reserve_device, seed_everything
from gptcore.entry import DeviceMemoryError, NonFinite, StopFlag, Stopped, process_parser, recording, run_process
from gptcore.evaluate import Evaluation, evaluate_loss
from gptcore.journal import Journal
from gptcore.models import LanguageModel, build_model
from gptcore.optim import Optimizers, build_optimizers, lr_factor
from gptcore.shards import ShardSet, prepare
from gptcore.store import content_id, home_dir
from gptcore.timing import PhaseClock, format_seconds

log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """All that a run is made of. `step` counts optimizer updates done."""

    config: ExperimentConfig
    shards: ShardSet
    device: Device
    model: LanguageModel
    optimizers: Optimizers
    sampler: Sampler
    micro_batch_size: int
    forward: Any  # the model, compiled where that pays
    step: int = 0
    clock: PhaseClock = field(default_factory=PhaseClock)

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.global_batch_size * self.config.model.block_size

    @property
    def tokens_seen(self) -> int:
        return self.step * self.tokens_per_step


def build_trainer(config: ExperimentConfig, shards: ShardSet) -> Trainer:
    """Everything in place before step 0, or a UserError that says which field to change."""
    train = config.train
    shards.check_fits(config.model.block_size)
    device = choose_device(train.device, train.precision)
    seed_everything(train.seed)
    model = build_model(config.model, shards.vocab_size).to(device.torch)
    sampler = build_sampler(shards, config)
    micro = train.global_batch_size if train.micro_batch_size == "auto" else train.micro_batch_size
    forward = _compiled(model, device, train.compile)
    return Trainer(config, shards, device, model, build_optimizers(model, train), sampler, micro, forward)


def train_step(trainer: Trainer) -> tuple[Tensor, Tensor, float]:
    """One optimizer update: (mean loss, gradient norm before clipping, share of the peak learning rate).

    The gradient is the sum over target tokens divided by their number in the whole batch, whatever the micro-batch. When
    the device's memory runs out, the micro-batch shrinks to its largest divisor that is at most half and the step starts again.
    Raises NonFinite before the update, DeviceMemoryError when one sequence does not fit.
    """
    train, clock = trainer.config.train, trainer.clock
    while True:
        try:
            loss = accumulate_gradients(trainer)
            break
        except torch.OutOfMemoryError as error:
            trainer.optimizers.zero_grad()
            trainer.micro_batch_size = _smaller_micro_batch(trainer.micro_batch_size, error)
            log.warning("out of device memory: train.micro_batch_size is now %d", trainer.micro_batch_size)
    with clock.phase("clip"):
        norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), train.grad_clip or math.inf)
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            raise NonFinite(
                f"loss {loss.item()} and gradient norm {norm.item()} at step {trainer.step} with train.lr={train.lr}; "
                "lower train.lr, or raise train.warmup_steps"
            )
    with clock.phase("optimizer"):
        factor = lr_factor(
            trainer.step, train.max_steps, train.warmup_steps, train.decay_fraction, train.min_lr / train.lr
        )
        trainer.optimizers.set_lr_factor(factor)
        trainer.optimizers.step()
        trainer.optimizers.zero_grad()
    trainer.step += 1
    return loss, norm, factor


def accumulate_gradients(trainer: Trainer) -> Tensor:
    """Sum the gradients of all micro-batches of this step; the mean loss over the batch, in nats per token."""
    train, micro, device = trainer.config.train, trainer.micro_batch_size, trainer.device
    start = trainer.step * train.global_batch_size
    n_targets = trainer.tokens_per_step
    total = torch.zeros((), device=device.torch)
    for offset in range(0, train.global_batch_size, micro):
        with trainer.clock.phase("data"):
            x, y = (
                torch.from_numpy(a).to(device.torch, non_blocking=True)
                for a in trainer.sampler.batch(start + offset, micro)
            )
        with trainer.clock.phase("forward"), device.autocast():
            loss = trainer.forward(x, y, reduction="sum")[1] / n_targets
        with trainer.clock.phase("backward"):
            loss.backward()
        total += loss.detach()
    return total


def train_loop(trainer: Trainer, journal: Journal, out: Path, stop: StopFlag) -> dict[str, Any]:
    """Step, report, evaluate, save, until `max_steps`; then the result of the run as JSON-able numbers."""
    train, device, clock = trainer.config.train, trainer.device, trainer.clock
    start = time.perf_counter()
    untrained = _evaluate(trainer, journal, train.eval_tokens) if trainer.step == 0 else None
    if untrained is not None:
        log.info(
            "untrained loss %.4f; a uniform guess has -ln(1/%d) = %.4f",
            untrained.loss,
            trainer.model.vocab_size,
            math.log(trainer.model.vocab_size),
        )
    losses: list[Tensor] = []
    step_ms: list[float] = []
    last = untrained
    while trainer.step < train.max_steps:
        began = time.perf_counter()
        loss, norm, factor = train_step(trainer)
        losses.append(loss)
        step_ms.append((time.perf_counter() - began) * 1e3)
        done = trainer.step == train.max_steps
        if trainer.step % train.log_interval == 0 or done:
            with clock.phase("report"):
                _report(trainer, journal, losses, step_ms, norm, factor, last)
            losses, step_ms = [], []
        if trainer.step % train.eval_interval == 0 or done:
            last = _evaluate(trainer, journal, 0 if done else train.eval_tokens)
        if trainer.step % train.save_interval == 0 or done or stop:
            checkpoint = _save(trainer, out)
        if stop and not done:
            raise Stopped(f"stopped at step {trainer.step} of {train.max_steps}; checkpoint {checkpoint}")
    if last is None:  # resumed after the last step
        last = _evaluate(trainer, journal, 0)
        checkpoint = list_checkpoints(out / "checkpoints")[-1]
    device.synchronize()
    seconds = time.perf_counter() - start
    journal.metrics(
        {f"time/{phase}_seconds": s for phase, s in clock.seconds.items()},
        tokens_seen=trainer.tokens_seen,
        step=trainer.step,
    )
    return {
        "checkpoint": str(checkpoint),
        "val_loss": last.loss,
        "val_bpb": last.bpb,
        "untrained_loss": untrained.loss if untrained is not None else None,
        "uniform_loss": math.log(trainer.model.vocab_size),
        "parameters": trainer.model.count_parameters(),
        "tokens_seen": trainer.tokens_seen,
        "steps": trainer.step,
        "seconds": seconds,
        "phases": {phase: round(s, 3) for phase, s in clock.seconds.items()},
        "device": device.name,
        "precision": device.precision,
    }


def _report(
    trainer: Trainer,
    journal: Journal,
    losses: list[Tensor],
    step_ms: list[float],
    norm: Tensor,
    factor: float,
    last: Evaluation | None,
) -> None:
    """One line for people, one for the journal."""
    train, device = trainer.config.train, trainer.device
    loss = torch.stack(losses).mean().item()
    tok_per_sec = len(step_ms) * trainer.tokens_per_step / (sum(step_ms) / 1e3)
    values = {
        "train/loss": loss,
        "train/lr": train.lr * factor,
        "train/grad_norm": norm.item(),
        "perf/tok_per_sec": tok_per_sec,
        "perf/step_ms": statistics.median(step_ms),
        "mem/peak_mib": device.peak_mib(),
    }
    flops = trainer.model.flops_per_token()
    if device.peak_flops is not None and flops:
        values["perf/mfu"] = 100 * flops * tok_per_sec / device.peak_flops
    journal.metrics(values, tokens_seen=trainer.tokens_seen, step=trainer.step)
    eta = (train.max_steps - trainer.step) * trainer.tokens_per_step / tok_per_sec
    log.info(
        "step %d/%d  loss %.4f  val %s  lr %.2e  %s tok/s  %.0f ms%s  %.0f MiB  ETA %s",
        trainer.step,
        train.max_steps,
        loss,
        f"{last.loss:.4f} ({last.bpb:.4f} bpb)" if last is not None else "-",
        train.lr * factor,
        f"{tok_per_sec:,.0f}",
        values["perf/step_ms"],
        f"  MFU {values['perf/mfu']:.0f} %" if "perf/mfu" in values else "",
        values["mem/peak_mib"],
        format_seconds(eta),
    )


def _evaluate(trainer: Trainer, journal: Journal, max_tokens: int) -> Evaluation:
    with trainer.clock.phase("evaluate"):
        evaluation = evaluate_loss(
            trainer.model, trainer.shards, trainer.device, trainer.config.evaluate.batch_size, max_tokens
        )
        journal.metrics(evaluation.metrics(), tokens_seen=trainer.tokens_seen, step=trainer.step)
    return evaluation


def _save(trainer: Trainer, out: Path) -> Path:
    with trainer.clock.phase("save"):
        state = {
            "tokens_seen": trainer.tokens_seen,
            "vocab_size": trainer.shards.vocab_size,
            "vocab_fingerprint": trainer.shards.fingerprint,
            "shards_id": trainer.shards.id,
            "micro_batch_size": trainer.micro_batch_size,
            "rng": {"cpu": torch.get_rng_state().tolist()}
            | ({"cuda": torch.cuda.get_rng_state().tolist()} if trainer.device.is_cuda else {}),
        }
        return save_checkpoint(
            out / "checkpoints",
            trainer.step,
            trainer.model,
            trainer.optimizers.state_tensors(),
            state,
            trainer.config,
            trainer.shards.directory / "tokenizer.json",
            trainer.config.train.keep_checkpoints,
        )


def resume(trainer: Trainer, out: Path) -> None:
    """Continue from the newest checkpoint of this run, if there is one for the same config and shards."""
    checkpoints = list_checkpoints(out / "checkpoints")
    if not checkpoints:
        return
    checkpoint = load_checkpoint(checkpoints[-1])
    if checkpoint.config.model_dump(exclude={"name"}) != trainer.config.model_dump(exclude={"name"}):
        raise UserError(
            f"{out}: holds checkpoints of another config; give another --out, or delete {out / 'checkpoints'}"
        )
    if checkpoint.state["shards_id"] != trainer.shards.id:
        raise UserError(
            f"{out}: its checkpoints were trained on shard set {checkpoint.state['shards_id']}, not {trainer.shards.id}; give another --out"
        )
    trainer.model.load_state_dict(checkpoint.model)
    trainer.optimizers.load_state_tensors(load_optimizer_tensors(checkpoints[-1]))
    trainer.step, trainer.micro_batch_size = checkpoint.state["step"], checkpoint.state["micro_batch_size"]
    torch.set_rng_state(torch.tensor(checkpoint.state["rng"]["cpu"], dtype=torch.uint8))
    if trainer.device.is_cuda:
        torch.cuda.set_rng_state(torch.tensor(checkpoint.state["rng"]["cuda"], dtype=torch.uint8))
    log.info("resumed at step %d from %s", trainer.step, checkpoints[-1])


def _compiled(model: LanguageModel, device: Device, choice: str) -> Any:
    if choice == "off" or (choice == "auto" and not device.is_cuda):
        return model
    from torch.utils._triton import has_triton

    if device.is_cuda and not has_triton():
        log.warning("train.compile=%s: no Triton here, so the model runs uncompiled", choice)
        return model
    return torch.compile(model)


def _smaller_micro_batch(micro: int, error: Exception) -> int:
    if micro == 1:
        raise DeviceMemoryError(
            "out of device memory with one sequence; lower model.block_size, model.n_embd or model.n_layer"
        ) from error
    return next(m for m in range(micro // 2, 0, -1) if micro % m == 0)


def default_out(config: ExperimentConfig) -> Path:
    """One directory a config: the same call finds its own checkpoints again."""
    return home_dir() / "runs" / f"{config.name}-{content_id(config.model_dump(mode='json'))[:8]}" / "train"


def main(argv: list[str]) -> dict[str, Any]:
    parser = process_parser(__doc__, "config", "experiment file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the experiment file")
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.overrides)
    shards = ShardSet.open(args.shards or prepare(config, home_dir()).shards)
    out: Path = args.out or default_out(config)
    stop = StopFlag()
    trainer = build_trainer(config, shards)
    stop.install()
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(recording(out, args.run, args.parent))
        stack.enter_context(reserve_device(trainer.device))
        (out / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
        resume(trainer, out)
        journal.tags(trainer.device.tags())
        journal.params(
            flatten(config)
            | {
                "parameters": trainer.model.count_parameters(),
                "device": trainer.device.name,
                "precision": trainer.device.precision,
                "shards": shards.id,
            }
        )
        log.info(
            "%s with %s parameters on %s in %s; %s tokens a step, %d micro-step(s)",
            config.model.family,
            f"{trainer.model.count_parameters():,}",
            trainer.device.name,
            trainer.device.precision,
            f"{trainer.tokens_per_step:,}",
            config.train.global_batch_size // trainer.micro_batch_size,
        )
        result = train_loop(trainer, journal, out, stop)
        journal.artifact("config.yaml")
        journal.artifact(result["checkpoint"], folder="checkpoint")
    return {"run": args.run or out.resolve().name, **result}


if __name__ == "__main__":
    raise SystemExit(run_process(main))

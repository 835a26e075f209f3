"""Step, report, evaluate, save, until the end."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptcore.checkpoint import list_checkpoints, load_checkpoint
from gptcore.entry import StopFlag, Stopped
from gptcore.evaluate import Evaluation, evaluate_loss
from gptcore.journal import Journal
from gptcore.train.report import Reporter, check_finite
from gptcore.train.saving import averaged, save
from gptcore.train.step import train_step
from gptcore.train.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass
class Best:
    """The evaluation with the fewest bits per byte so far."""

    bpb: float | None = None
    step: int = 0
    stale: int = 0  # evaluations since then

    def take(self, evaluation: Evaluation, step: int) -> bool:
        """Whether this one is better."""
        is_better = self.bpb is None or evaluation.bpb < self.bpb
        if is_better:
            self.bpb, self.step = evaluation.bpb, step
        self.stale = 0 if is_better else self.stale + 1
        return is_better


def train_loop(
    trainer: Trainer, journal: Journal, out: Path, stop: StopFlag, memory: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Until max_steps, max_tokens, minutes or patience end the run; its result as JSON-able numbers.

    memory: what `resume` returned.
    """
    train, clock, ranks = trainer.config.train, trainer.clock, trainer.ranks
    trainer.started = start = time.perf_counter()
    best = Best(**memory) if memory else Best()
    reporter = Reporter(trainer, journal)
    untrained = evaluate(trainer, journal, train.eval_tokens) if trainer.step == 0 else None
    if untrained is not None:
        uniform = math.log(trainer.model.vocab_size)
        log.info("untrained loss %.4f; a uniform guess has ln V = %.4f", untrained.loss, uniform)
    last, is_done, is_stopped = untrained, trainer.progress() >= 1, False
    with controlled_gc():
        reporter.timer.restart()
        while not is_done:
            loss, norm, factor = train_step(trainer)
            reporter.losses.append(loss)
            reporter.timer.mark()
            is_done = trainer.progress() >= 1
            is_stopped = ranks.any(bool(stop)) and not is_done
            is_evaluation = trainer.step % train.eval_interval == 0 and not is_done
            is_saving = trainer.step % train.save_interval == 0 or is_done or is_stopped
            is_report = trainer.step % train.log_interval == 0 or is_done
            if not (is_evaluation or is_saving or is_report):
                continue
            reporter.pause()
            if is_report:
                with clock.phase("report"):
                    reporter.report(norm, factor, last)
            check_finite(trainer)
            if is_evaluation or (is_done and train.select == "best"):
                last = evaluate(trainer, journal, train.eval_tokens)
                if best.take(last, trainer.step) and train.select == "best":
                    save(trainer, out / "best", 1, asdict(best))
                if train.patience and best.stale >= train.patience:
                    log.info("stopped early: no better bpb since step %d", best.step)
                    is_done = is_saving = True
                gc.collect()
            if is_saving:
                save(trainer, out / "checkpoints", train.keep_checkpoints, asdict(best))
            if is_stopped and not is_done:
                raise Stopped(
                    f"stopped at step {trainer.step} of {trainer.max_steps or '?'}; checkpoint "
                    f"{out.resolve() / 'checkpoints' / f'step_{trainer.step:06d}'}"
                )
            reporter.timer.restart()
    chosen = list_checkpoints(out / ("best" if train.select == "best" else "checkpoints"))[-1]
    if train.select == "best":
        use_weights(trainer, chosen)
    last = evaluate(trainer, journal, 0)
    trainer.device.synchronize()
    seconds = time.perf_counter() - start
    if ranks.is_first:
        phases = {f"time/{phase}_seconds": s for phase, s in clock.seconds.items()}
        journal.metrics(phases, tokens_seen=trainer.tokens_seen, step=trainer.step)
    return {
        "checkpoint": str(chosen.resolve()),
        "val_loss": last.loss,
        "val_bpb": last.bpb,
        "untrained_loss": untrained.loss if untrained is not None else None,
        "uniform_loss": math.log(trainer.model.vocab_size),
        "parameters": trainer.model.count_parameters(),
        "tokens_seen": trainer.tokens_seen,
        "steps": trainer.step,
        "best_step": best.step if train.select == "best" else trainer.step,
        "seconds": seconds,
        "phases": {phase: round(s, 3) for phase, s in clock.seconds.items()},
        "device": trainer.device.name,
        "precision": trainer.device.precision,
    }


def evaluate(trainer: Trainer, journal: Journal, max_tokens: int) -> Evaluation:
    """The weights that would be saved now on the validation split's first `max_tokens` tokens, or on all of it when 0."""
    with trainer.clock.phase("evaluate"), averaged(trainer):
        evaluation = evaluate_loss(
            trainer.model,
            trainer.shards,
            trainer.device,
            trainer.config.evaluate.batch_size,
            max_tokens,
            ranks=trainer.ranks,
        )
    if trainer.ranks.is_first:
        journal.metrics(evaluation.metrics(), tokens_seen=trainer.tokens_seen, step=trainer.step)
    return evaluation


def use_weights(trainer: Trainer, checkpoint: Path) -> None:
    """Put a checkpoint's model in place for good."""
    trainer.model.load_weights(load_checkpoint(checkpoint, trainer.device.torch).model)
    trainer.average = None


@contextmanager
def controlled_gc() -> Iterator[None]:
    """No garbage collection in the middle of a step: what is there now is left out of it, the rest is looked at after evaluations."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()

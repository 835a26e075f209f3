"""Step, report, evaluate, save, until the end."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from gptcore.checkpoint import MODEL, check_checkpoint, checkpoint_path, copy_tensors
from gptcore.entry import StopFlag
from gptcore.errors import Stopped
from gptcore.evaluate import Evaluation, evaluate_loss
from gptcore.journal import Journal
from gptcore.train.distribute import put_away, uncompiled
from gptcore.train.report import Reporter, check_finite
from gptcore.train.saving import Memory, averaged, checkpoints_of, save
from gptcore.train.step import train_step
from gptcore.train.trainer import Trainer
from gptcore.train.writer import CheckpointWriter, Written

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


def train_loop(trainer: Trainer, journal: Journal, out: Path, stop: StopFlag, memory: Memory | None = None) -> dict[str, Any]:
    """Until max_steps, max_tokens, minutes or patience end the run; its result as JSON-able numbers.

    memory: what `resume` returned. Raises Stopped once `stop` is set: after the step under way, with a checkpoint on disk (none of
    this step while its text is still being verified and that takes too long to wait for);
    DamagedError for shards that are not what was written, with nothing learnt from them on disk.
    """
    trainer.started = time.perf_counter()
    train = trainer.config.train

    def tell(written: Written) -> None:
        log.info("step %d saved: %.1f ms of standstill, %.0f ms to write", *astuple(written))
        took = {"perf/save_stall_ms": written.stall_ms, "perf/save_ms": written.write_ms}
        journal.metrics(took, tokens_seen=written.step * trainer.tokens_per_step, step=written.step)

    # Writing takes seconds, copying milliseconds: so a thread writes, and the training goes on.
    writer = CheckpointWriter(checkpoints_of(out), train.keep_checkpoints, train.keep_interval, tell)
    loop = _Loop(trainer, journal, writer, stop, memory or {})
    try:
        loop.run()
    finally:
        writer.close()
    trainer.ranks.wait()  # for the checkpoint that the first process wrote
    chosen = checkpoint_path(checkpoints_of(out), loop.best.step if train.select == "best" else trainer.step)
    if train.select == "best":
        # What is evaluated last and handed on is the best, not where the run happened to end.
        use_weights(trainer, chosen)
    try:
        last = evaluate(trainer, journal, 0, stop)
    except Stopped:
        raise Stopped(f"stopped after the last step, {trainer.step}; checkpoint {chosen}") from None
    trainer.device.synchronize()
    seconds = trainer.elapsed_seconds()  # of all attempts
    if trainer.ranks.is_first:
        phases = {f"time/{phase}_seconds": s for phase, s in trainer.clock.seconds.items()}
        journal.metrics(phases, tokens_seen=trainer.tokens_seen, step=trainer.step)
    return {
        "checkpoint": str(chosen),
        "val_loss": last.loss,
        "val_bpb": last.bpb,
        "untrained_loss": loop.untrained.loss if loop.untrained is not None else None,
        "uniform_loss": math.log(trainer.model.vocab_size),
        "parameters": trainer.model.count_parameters(),
        "tokens_seen": trainer.tokens_seen,
        "steps": trainer.step,
        "best_step": loop.best.step if train.select == "best" else trainer.step,
        "seconds": seconds,
        "phases": {phase: round(s, 3) for phase, s in trainer.clock.seconds.items()},
        "device": trainer.device.name,
        "precision": trainer.device.precision,
    }


class _Loop:
    """The steps of a run and what is due between them."""

    def __init__(self, trainer: Trainer, journal: Journal, writer: CheckpointWriter, stop: StopFlag, memory: Memory) -> None:
        self.trainer, self.journal, self.writer, self.stop = trainer, journal, writer, stop
        self.train = trainer.config.train
        self.best = Best(**memory["best"]) if memory else Best()
        self.owes_evaluation = bool(memory) and memory["owes_evaluation"]  # the signal came first
        self.reporter = Reporter(trainer, journal)
        self.reporter.losses = memory["losses"] if memory else []
        self.last: Evaluation | None = None
        self.untrained: Evaluation | None = None

    def run(self) -> None:
        trainer, train = self.trainer, self.train
        if trainer.step == 0:
            # A fresh model should lose about ln V a token. Much more or less is a bug in initialisation or targets, and here it
            # is seen before an hour is spent.
            self.last = self.untrained = evaluate(trainer, self.journal, train.eval_tokens, self.stop)
            uniform = math.log(trainer.model.vocab_size)
            log.info("untrained loss %.4f; a uniform guess has ln V = %.4f", self.untrained.loss, uniform)
        if self.owes_evaluation and self._evaluate() and train.select == "best":
            self._save()
        is_done = trainer.progress() >= 1 or self._has_lost_patience()
        with controlled_gc():
            # What comes before the first step, compiling too, is not a step's time.
            self.reporter.timer.restart()
            while not is_done:
                loss, norm, factor = train_step(trainer)
                # A tensor of the device, not a number: asking would wait for the step, and the CPU could not queue the next one
                # meanwhile.
                self.reporter.losses.append(loss)
                self.reporter.timer.mark()
                # A full disk is told at the next step, not at the end.
                self.writer.check()
                trainer.shards.verification.check()
                is_done = trainer.progress() >= 1
                # A signal reaches one process sooner than another; all have to leave after the same step, or the rest waits for
                # ever.
                is_stopped = trainer.ranks.any(bool(self.stop)) and not is_done
                is_report = trainer.step % train.log_interval == 0 or is_done
                is_evaluation = trainer.step % train.eval_interval == 0 or (is_done and train.select == "best")
                is_saving = trainer.step % train.save_interval == 0 or is_done or is_stopped
                if not (is_evaluation or is_saving or is_report):
                    continue
                self.reporter.pause()
                if is_report:
                    with trainer.clock.phase("report"):
                        self.reporter.report(norm, factor, self.last)
                # Before anything is evaluated or saved: a checkpoint of no numbers would replace a good one.
                check_finite(trainer)
                if is_evaluation and (not is_done or train.select == "best"):
                    is_best, is_stopped = self._judge(is_stopped)
                    is_done = is_done or self._has_lost_patience()
                    # The best weights have to be on disk when they are chosen: the next step overwrites them.
                    is_saving = is_saving or is_stopped or is_done or (is_best and train.select == "best")
                if is_saving:
                    self._save()
                if is_stopped:
                    self.writer.wait()
                    raise Stopped(
                        f"stopped at step {trainer.step} of {trainer.max_steps or '?'}; checkpoint "
                        f"{checkpoint_path(self.writer.folder, trainer.step)}"
                    )
                self.reporter.timer.restart()
        self.writer.wait()

    def _judge(self, is_stopped: bool) -> tuple[bool, bool]:
        """Evaluate, unless the run is being stopped; (whether it is the best so far, whether the run is being stopped)."""
        if not is_stopped:
            try:
                return self._evaluate(), False
            except Stopped:
                log.info("stopping: this evaluation is left to whoever resumes the run")
        self.owes_evaluation = True
        return False, True

    def _evaluate(self) -> bool:
        self.last = evaluate(self.trainer, self.journal, self.train.eval_tokens, self.stop)
        self.owes_evaluation = False
        # Now, while the device is waiting anyway: within steps it is switched off.
        gc.collect()
        return self.best.take(self.last, self.trainer.step)

    def _has_lost_patience(self) -> bool:
        is_over = bool(self.train.patience) and self.best.stale >= self.train.patience
        if is_over:
            log.info("stopped early: no better bpb since step %d", self.best.step)
        return is_over

    def _save(self) -> None:
        # A checkpoint is believed later on: it holds nothing of text that was not verified.
        is_late = not self.trainer.shards.verification.settle(lambda: bool(self.stop))
        if self.trainer.ranks.any(is_late):
            raise Stopped(
                f"stopped at step {self.trainer.step}, which is not saved: its text was still being verified; the run goes on from its "
                "newest checkpoint, or from the start"
            )
        memory = {"best": asdict(self.best), "owes_evaluation": self.owes_evaluation, "losses": self.reporter.losses}
        save(self.trainer, self.writer, memory, self.best.step if self.train.select == "best" else None)


def evaluate(trainer: Trainer, journal: Journal, max_tokens: int, stop: StopFlag) -> Evaluation:
    """The weights that would be saved now on the validation split's first `max_tokens` tokens, or on all of it when 0.

    Raises Stopped in the middle once `stop` is set; not with several processes, which would wait for each other.
    """
    interrupting = stop.interrupting() if trainer.ranks.count == 1 else nullcontext()
    batch_size = trainer.config.evaluate.batch_size
    # Uncompiled: other shapes than a step's would be compiled for a single use.
    with trainer.clock.phase("evaluate"), averaged(trainer), uncompiled(trainer.model), interrupting:
        evaluation = evaluate_loss(trainer.model, trainer.shards, trainer.device, batch_size, max_tokens, ranks=trainer.ranks)
        put_away(trainer.model)
    if trainer.ranks.is_first:
        journal.metrics(evaluation.metrics(), tokens_seen=trainer.tokens_seen, step=trainer.step)
    return evaluation


def use_weights(trainer: Trainer, checkpoint: Path) -> None:
    """Put a checkpoint's model in place for good."""
    check_checkpoint(checkpoint)
    copy_tensors(checkpoint / MODEL, trainer.model.weights())
    trainer.average = None


@contextmanager
def controlled_gc() -> Iterator[None]:
    """No garbage collection in the middle of a step: what is there now is left out of it, the rest is looked at after evaluations."""
    gc.collect()
    # A collection goes through all objects of Python, and stops a step for milliseconds at moments of its own choosing. What is
    # there now stays, so it is never looked at again.
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()

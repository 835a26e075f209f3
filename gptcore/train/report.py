"""What a run tells while it goes: one line for people, one for the journal, every `log_interval` steps."""

from __future__ import annotations

import logging
import math
import statistics
import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gptcore.evaluate import Evaluation
from gptcore.journal import Journal
from gptcore.timing import format_seconds
from gptcore.train.trainer import Trainer
from gptcore.usage import Usage

log = logging.getLogger(__name__)


class StepTimer:
    """Milliseconds from one `mark` to the next. On a GPU the device itself notes the time, so nobody waits for it."""

    def __init__(self, *, is_cuda: bool) -> None:
        self._is_cuda = is_cuda
        self._marks: list[Any] = []  # events of the device, or seconds

    def restart(self) -> None:
        """What was since the last mark (an evaluation, a report) was no step."""
        self._marks = []
        self.mark()

    def mark(self) -> None:
        if not self._is_cuda:
            self._marks.append(time.perf_counter())
            return
        self._marks.append(torch.cuda.Event(enable_timing=True))
        self._marks[-1].record()

    def take(self) -> list[float]:
        """The steps since the last restart."""
        pairs = list(pairwise(self._marks))
        if not self._is_cuda:
            return [1e3 * (b - a) for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairs]


class Reporter:
    """Gathers the steps between two reports; the device is asked for numbers only when one is due."""

    def __init__(self, trainer: Trainer, journal: Journal) -> None:
        self.trainer, self.journal = trainer, journal
        self.timer = StepTimer(is_cuda=trainer.device.is_cuda)
        self.usage = Usage(trainer.device.uuid) if trainer.ranks.is_first else None
        self.losses: list[Tensor] = []
        self.step_ms: list[float] = []
        n_tokens, n_bytes = trainer.shards.n_tokens["train"], trainer.shards.n_bytes["train"]
        self._bits_per_nat = n_tokens / (math.log(2) * n_bytes)  # of the training text's mean token

    def pause(self) -> None:
        """An interruption is about to begin: what was timed so far counts."""
        self.step_ms += self.timer.take()

    def report(self, norm: Tensor, factor: float, last: Evaluation | None) -> None:
        """The steps since the last report. Raises NonFinite if one of them was bad. Call `pause` before."""
        trainer, train = self.trainer, self.trainer.config.train
        check_finite(trainer)
        loss = trainer.ranks.sum_(torch.stack(self.losses).mean()).item()
        tok_per_sec = len(self.step_ms) * trainer.tokens_per_step / (sum(self.step_ms) / 1e3)
        values = {
            "train/loss": loss,
            "train/bpb": loss * self._bits_per_nat,
            "train/lr": train.lr * factor,
            "train/grad_norm": norm.item(),
            "perf/tok_per_sec": tok_per_sec,
            "perf/step_ms": statistics.median(self.step_ms),
            "mem/peak_mib": trainer.device.peak_mib(),
        }
        if not math.isfinite(values["train/grad_norm"]):  # fp16: a step that was left out
            del values["train/grad_norm"]
        flops = trainer.model.flops_per_token()
        if trainer.device.peak_flops is not None and flops:
            values["perf/mfu"] = 100 * flops * tok_per_sec / (trainer.device.peak_flops * trainer.ranks.count)
        self.losses, self.step_ms = [], []
        if self.usage is not None:
            values |= self.usage.take()
            self.journal.metrics(values, tokens_seen=trainer.tokens_seen, step=trainer.step)
            log.info("%s", self._line(values, last))

    def _line(self, values: dict[str, float], last: Evaluation | None) -> str:
        trainer = self.trainer
        left = []  # seconds until each end of the run
        if trainer.max_steps:
            left.append((trainer.max_steps - trainer.step) * trainer.tokens_per_step / values["perf/tok_per_sec"])
        if trainer.config.train.minutes:
            left.append(60 * trainer.config.train.minutes + trainer.started - trainer.seconds_before - time.perf_counter())
        parts = [
            f"step {trainer.step}/{trainer.max_steps or '?'}",
            f"loss {values['train/loss']:.4f} ({values['train/bpb']:.3f} bpb)",
            f"val {last.loss:.4f} ({last.bpb:.4f} bpb)" if last is not None else "val -",
            f"lr {values['train/lr']:.2e}",
            f"{values['perf/tok_per_sec']:,.0f} tok/s",
            f"{values['perf/step_ms']:.{0 if values['perf/step_ms'] >= 10 else 1}f} ms",
            *([f"MFU {values['perf/mfu']:.0f} %"] if "perf/mfu" in values else []),
            f"{values['mem/peak_mib']:.0f} MiB",
            f"ETA {format_seconds(max(0.0, min(left)))}",
        ]
        return "  ".join(parts)


def check_finite(trainer: Trainer) -> None:
    """Raises NonFinite if a step since the last check was bad; waits for the device."""
    trainer.watch.check(trainer.step, trainer.config.train.lr)
    if trainer.loss_scale is not None:
        trainer.loss_scale.check(trainer.step, trainer.config.train.lr)

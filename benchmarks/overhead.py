"""What the trainer costs over the bare step: alternating pairs of both on the same model, batch and device.

    .venv/bin/python benchmarks/overhead.py experiments/shakespeare.yaml [section.field=value …] --shards DIR

Bare: forward, backward, clipping, optimizer on one batch that lies on the device (its recorded graph, where there is one). Trainer: batches
from the shards, schedule, the watch for bad numbers, reports every log_interval steps. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from figures import figure, print_figures

from gptcore.config import load_config
from gptcore.journal import Journal
from gptcore.shards import ShardSet, prepare
from gptcore.store import home_dir
from gptcore.train import Trainer, build_trainer, train_step
from gptcore.train.report import Reporter
from gptcore.train.step import next_batch

GOAL_PERCENT = 2.0
T_95 = {9: 1.833, 10: 1.812, 14: 1.761, 19: 1.729, 29: 1.699}  # Student's t, one-sided, by degrees of freedom


def bare_step(trainer: Trainer) -> Callable[[], None]:
    """The least that learns: what a script without a trainer would do."""
    x, y = next_batch(trainer)
    if trainer.use_graph:
        while trainer.graph is None or trainer.graph._graph is None:
            train_step(trainer)
        return trainer.graph._graph.replay
    parameters = list(trainer.model.parameters())
    micro = trainer.micro_batch_size

    def step() -> None:
        for start in range(0, len(x), micro):
            with trainer.device.autocast():
                loss = trainer.forward(x[start : start + micro], y[start : start + micro], reduction="sum")[1]
            (loss / trainer.tokens_per_step).backward()
        torch.nn.utils.clip_grad_norm_(parameters, trainer.config.train.grad_clip or math.inf)
        trainer.optimizers.step()
        trainer.optimizers.zero_grad()

    return step


def timed(trainer: Trainer, call: Callable[[], None], count: int) -> float:
    """Milliseconds of `count` calls."""
    trainer.device.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    trainer.device.synchronize()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="steps of each half of a pair")
    args = parser.parse_intermixed_args()
    config = load_config(args.experiment, [*args.overrides, "train.max_steps=1000000"])
    shards = ShardSet.open(args.shards or prepare(config, home_dir()).shards)
    trainer = build_trainer(config, shards)
    bare = bare_step(trainer)
    with tempfile.TemporaryDirectory(prefix="gptloom-bench-") as folder, trainer.device.attention(config.model.dropout):
        reporter = Reporter(trainer, Journal(Path(folder)))
        reporting: list[float] = []

        def step() -> None:
            loss, norm, factor = train_step(trainer)
            reporter.losses.append(loss)
            reporter.timer.mark()
            if trainer.step % config.train.log_interval == 0:
                start = time.perf_counter()
                reporter.pause()
                reporter.report(norm, factor, None)
                reporting.append(1e3 * (time.perf_counter() - start))
                reporter.timer.restart()

        for call in (bare, step):
            timed(trainer, call, 5)
        percent = []
        for pair in range(args.pairs):
            halves = [bare, step] if pair % 2 == 0 else [step, bare]
            ms = {call: timed(trainer, call, args.steps) for call in halves}
            percent.append(100 * (ms[step] / ms[bare] - 1))
    mean, spread = statistics.mean(percent), statistics.stdev(percent) / math.sqrt(len(percent))
    t = T_95[max((df for df in T_95 if df <= len(percent) - 1), default=9)]
    found = figure("trainer over the bare step, upper 95 % bound", "%", [mean + t * spread], goal=GOAL_PERCENT)
    found |= {"n": len(percent), "spread": [round(min(percent), 2), round(max(percent), 2)]}
    per_report = figure("inside one report", "ms", reporting, digits=3)
    print_figures([found, per_report], mean_percent=round(mean, 3), steps_per_report=config.train.log_interval)


if __name__ == "__main__":
    main()

"""Where the time goes: of everything from raw text to report, and inside a training step.

    gptloom study timing                                                                   # the study
    python -m gptcore.studies.timing CONFIG.yaml --shards DIR --out DIR --checkpoint DIR   # its short form in a pipeline run

The study's cells are of two kinds: pipeline (timing_pipeline) and step (timing_step); timing_summary says what they gave,
timing_advice what to change, timing_difference what became slower between two runs.

The clock synchronises the device at every boundary, so the sections are exact and add up; on a GPU that costs the overlap of
kernels, which is why the wall time of undisturbed steps stands beside it.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile

from gptcore.config import with_changes
from gptcore.config.study import Cell
from gptcore.entry import run_process
from gptcore.models import LanguageModel
from gptcore.studies.engine import Bench, CellResult, Study
from gptcore.studies.short import Outcome, Subject, run_study
from gptcore.studies.timing_options import TimingOptions
from gptcore.studies.timing_pipeline import measure_pipeline
from gptcore.studies.timing_step import measure_step
from gptcore.studies.timing_summary import summarize
from gptcore.timing import PhaseClock, measure_ms
from gptcore.train import Trainer, build_trainer, train_step

TRACE = "trace.json.gz"
MODULES = {
    "attn": "forward: attention",
    "mlp": "forward: feed-forward",
    "lm_head": "forward: head",
    "wte": "forward: embedding",
    "lstm": "forward: lstm",
}


def time_modules(model: LanguageModel, clock: PhaseClock) -> ExitStack:
    """Charge each module's forward pass to its own section; close the result to take the hooks off again."""
    stack = ExitStack()
    for name, module in model.named_modules():
        section = MODULES.get(name.rsplit(".", 1)[-1])
        if section is None:
            continue
        running: list[Any] = []

        def enter(_module: nn.Module, _args: object, section: str = section, running: list[Any] = running) -> None:
            running.append(clock.phase(section))
            running[-1].__enter__()

        def leave(_module: nn.Module, _args: object, _output: object, running: list[Any] = running) -> None:
            running.pop().__exit__(None, None, None)

        stack.callback(module.register_forward_pre_hook(enter).remove)
        stack.callback(module.register_forward_hook(leave).remove)
    return stack


def measure(subject: Subject) -> Outcome:
    repeats = subject.config.studies.repeats
    steps = 2 * repeats + 3  # warm-ups and the traced step included
    config = with_changes(
        subject.config,
        train={"max_steps": steps, "warmup_steps": min(steps, subject.config.train.warmup_steps), "compile": "off"},
    )
    trainer = build_trainer(config, subject.shards)
    undisturbed = measure_ms(lambda: train_step(trainer), trainer.device.synchronize, repeats)
    samples = profile_steps(trainer, repeats)
    trace_step(trainer, subject.out / TRACE)
    wall = statistics.median(sum(sample.values()) for sample in samples)
    rows: list[dict[str, Any]] = []
    for section in samples[0]:
        values = [sample[section] for sample in samples]
        median = statistics.median(values)
        rows.append(
            {
                "section": section,
                "ms": median,
                "share": median / wall,
                "low": min(values),
                "high": max(values),
                "n": repeats,
            }
        )
    rows.sort(key=lambda row: -row["ms"])
    top = rows[0]
    conclusion = (
        f"A step takes {undisturbed.median:.0f} ms undisturbed and {wall:.0f} ms with the clock in it; "
        f"{top['section']} is the largest part with {100 * top['share']:.0f} % "
        f"({top['low']:.0f} to {top['high']:.0f} ms, n={repeats})."
    )
    metrics = {f"timing/{row['section'].replace(': ', '_')}_ms": row["ms"] for row in rows} | {
        "timing/step_ms": undisturbed.median
    }
    return Outcome(
        rows,
        conclusion,
        metrics,
        {
            "wall_ms": wall,
            "step_ms": undisturbed.median,
            "step_ms_low": undisturbed.low,
            "step_ms_high": undisturbed.high,
            "n": repeats,
        },
        (TRACE,),
    )


def profile_steps(trainer: Trainer, repeats: int) -> list[dict[str, float]]:
    """Milliseconds by section for each of `repeats` steps, after one that is thrown away."""
    samples = []
    for repeat in range(repeats + 1):
        trainer.clock = PhaseClock(trainer.device.synchronize)
        with time_modules(trainer.model, trainer.clock), trainer.clock.phase("other"):
            train_step(trainer)
        if repeat:
            samples.append({name: 1e3 * seconds for name, seconds in trainer.clock.seconds.items()})
    return samples


def trace_step(trainer: Trainer, path: Path) -> None:
    """One step as a Chrome trace (chrome://tracing or ui.perfetto.dev opens it), operator by operator."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if trainer.device.is_cuda else [])]
    with profile(activities=activities) as profiler:
        train_step(trainer)
        trainer.device.synchronize()
    profiler.export_chrome_trace(str(path))


def measure_cell(cell: Cell, bench: Bench) -> CellResult:
    """One cell of the study."""
    return {"pipeline": measure_pipeline, "step": measure_step}[cell.options.kind](cell, bench)


STUDY = Study("Timing map", TimingOptions, measure_cell, summarize)


def main(argv: list[str]) -> dict[str, Any]:
    return run_study("timing", __doc__, measure, argv)


if __name__ == "__main__":
    raise SystemExit(run_process(main))

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
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from gptcore.config import with_changes
from gptcore.entry import run_process
from gptcore.studies import Bench, Cell, CellResult
from gptcore.studies.short import Outcome, Subject, run_study
from gptcore.studies.timing.pipeline import measure_pipeline
from gptcore.studies.timing.sections import sections
from gptcore.studies.timing.step import measure_step
from gptcore.timing import MapClock, measure_ms
from gptcore.train import Trainer, build_trainer, train_step

TRACE = "trace.json.gz"


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
    wall = statistics.mean(sum(sample.values()) for sample in samples)  # means add up; medians would not
    rows: list[dict[str, Any]] = []
    for section in dict.fromkeys(section for sample in samples for section in sample):
        values = [sample.get(section, 0.0) for sample in samples]
        mean = statistics.mean(values)
        rows.append(
            {"section": section, "ms": mean, "share": mean / wall, "low": min(values), "high": max(values), "n": repeats}
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
        trainer.clock = clock = MapClock(trainer.device.synchronize)
        with sections(trainer.model, clock), clock.phase("other"):
            train_step(trainer)
        if repeat:
            samples.append({": ".join(path[1:]) or path[0]: 1e3 * s for path, s in clock.paths.items()})
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


def main(argv: list[str]) -> dict[str, Any]:
    return run_study("timing", __doc__, measure, argv)


if __name__ == "__main__":
    raise SystemExit(run_process(main))

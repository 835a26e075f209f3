"""Where the time goes: of everything from raw text to report, and inside a training step.

A cell is of one of two kinds: pipeline or step. summary says what they gave, advice what to change, difference what became slower
between two runs.

The clock synchronises the device at every boundary, so the sections are exact and add up; on a GPU that costs the overlap of
kernels, which is why the wall time of undisturbed steps stands beside it.
"""

from __future__ import annotations

from gptcore.studies import Bench, Cell, CellResult, Study
from gptcore.studies.timing.brief import brief
from gptcore.studies.timing.options import TimingOptions
from gptcore.studies.timing.pipeline import measure_pipeline
from gptcore.studies.timing.step import measure_step
from gptcore.studies.timing.summary import summarize


def measure_cell(cell: Cell, bench: Bench) -> CellResult:
    return {"pipeline": measure_pipeline, "step": measure_step}[cell.options.kind](cell, bench)


STUDY = Study("Timing map", TimingOptions, measure_cell, summarize, brief=brief)

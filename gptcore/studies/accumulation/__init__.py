"""One batch in 1 and in several micro-steps: are the gradients the same, what does it save, what does it cost?

A cell is of one of three kinds: exactness, economy, and learning; summary says what they gave.
"""

from __future__ import annotations

from gptcore.studies import Bench, Cell, CellResult, Study
from gptcore.studies.accumulation.brief import brief
from gptcore.studies.accumulation.economy import measure_economy
from gptcore.studies.accumulation.exactness import measure_exactness
from gptcore.studies.accumulation.learning import measure_learning
from gptcore.studies.accumulation.options import AccumulationOptions
from gptcore.studies.accumulation.summary import summarize


def measure_cell(cell: Cell, bench: Bench) -> CellResult:
    kinds = {"exactness": measure_exactness, "economy": measure_economy, "learning": measure_learning}
    return kinds[cell.options.kind](cell, bench)


STUDY = Study("Gradient accumulation", AccumulationOptions, measure_cell, summarize, brief=brief)

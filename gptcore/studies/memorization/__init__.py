"""How much of its training text a model recites, by its age and against text it never saw.

A cell is one training; what it recites is measured from its checkpoints, by the rule that guards the nights.
"""

from __future__ import annotations

from gptcore.studies import Study
from gptcore.studies.memorization.cell import measure_cell
from gptcore.studies.memorization.options import MemorizationOptions
from gptcore.studies.memorization.summary import summarize

STUDY = Study("Memorization", MemorizationOptions, measure_cell, summarize)

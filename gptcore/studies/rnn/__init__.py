"""Recurrent networks and counts against the Transformer: equal non-embedding parameters, equal FLOPs, equal time.

    python -m gptcore.train experiments/tinyshakespeare-mingru.yaml data.source=FILE    # minGRU's published setting, on a GPU

A cell is one family with one seed; summary reads the three comparisons off the same runs' curves. The baseline inside `gptloom run`
is a plain training: its config comes from gptcore.studies.sizes.
"""

from __future__ import annotations

from gptcore.studies import Study
from gptcore.studies.rnn.cell import measure_cell
from gptcore.studies.rnn.options import RnnOptions
from gptcore.studies.rnn.summary import summarize

STUDY = Study("RNN baseline", RnnOptions, measure_cell, summarize)

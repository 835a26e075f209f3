"""Recurrent networks and counts against the Transformer: equal non-embedding parameters, equal FLOPs, equal time.

    gptloom study rnn                                                   # the study
    python -m gptcore.train experiments/tinyshakespeare-mingru.yaml data.source=FILE    # minGRU's published setting, on a GPU

A cell is one family with one seed (rnn_cell); rnn_summary reads the three comparisons off the same runs' curves. The baseline inside
`gptloom run` is a plain training: its config comes from rnn_sizes.
"""

from __future__ import annotations

from gptcore.studies.engine import Study
from gptcore.studies.rnn_cell import RnnOptions, measure_cell
from gptcore.studies.rnn_summary import summarize

STUDY = Study("RNN baseline", RnnOptions, measure_cell, summarize)

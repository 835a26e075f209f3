"""The RNN study's runs at equal cost: every curve read where all trained families have spent the same FLOPs, or the same time.

One budget for all families, the largest that every one of their runs reached, so that each is compared with each and not only with
the baseline. Floors (bigram, n-gram) set no budget: they spend next to nothing, and would end the comparison where nobody has learnt
anything. They are lines to compare with. A run that spends more than the budget is read before the end of its learning-rate
schedule, where it would have become better.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from gptcore.config import ExperimentConfig

FLOORS = ("bigram", "ngram")  # families


def comparable(curves: pd.DataFrame, config: ExperimentConfig) -> pd.DataFrame:
    """Curves on one yardstick each: bits per byte of the same validation tokens, seconds at a steady pace.

    curves: columns cell, tokens, seconds, val_bpb, as trainings noted them. With train.eval_tokens a run's last evaluation alone is on
    the whole split, so it is left out; with train.select=best a run that ended here would have kept its best weights so far.

    Seconds are tokens times the median pace between evaluations, without the first stretch: loading kernels, recording a CUDA
    graph and compiling, and the same again after a resume, take as long for a short training as for a long one.
    """
    lines = []
    for _, line in curves.sort_values(["cell", "tokens"], kind="stable").groupby("cell", sort=False):
        if config.train.eval_tokens:
            line = line.iloc[:-1]
        if len(line) < 2:
            continue
        paces = np.diff(line["seconds"]) / np.diff(line["tokens"])  # seconds a token
        pace = np.median(paces[1:] if len(paces) > 1 else paces)
        line = line.assign(seconds=line["tokens"] * pace)
        if config.train.select == "best":
            line["val_bpb"] = line["val_bpb"].cummin()
        lines.append(line)
    return pd.concat(lines) if lines else curves.iloc[:0]


def at_budget(curves: pd.DataFrame, axis: str) -> pd.DataFrame:
    """Bits per byte of every run where it had spent what all reached of `axis` (flops, seconds), between its neighbours.

    curves: of the families that are compared, no floors. One row a run: cell, arm, seed, val_bpb, budget.
    """
    if curves.empty:
        return curves
    budget = curves.groupby("cell")[axis].max().min()
    rows = [
        {"cell": cell, "arm": arm, "seed": seed, "val_bpb": float(np.interp(budget, line[axis], line["val_bpb"]))}
        for (cell, arm, seed), line in curves.groupby(["cell", "arm", "seed"], sort=False)
    ]
    return pd.DataFrame(rows).assign(budget=budget)

"""What the trainings say together: recited prompts over the age, the last age of every arm against held-out text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from gptcore.report import page
from gptcore.report.study import curves_figure, figure, table
from gptcore.studies import Results, Summary
from gptcore.studies.statistics import Interval, mean_interval

TEXTS = {"train": "training text", "val": "held-out text"}
STYLES = {"passes": ".3g", "tokens_seen": ",.0f", "train_bpb": ".4f", "val_bpb": ".4f"}
STYLES |= dict.fromkeys(["train_recited", "val_recited", "train_in_runs", "val_in_runs", "memorized"], "%")

CAPTION = (
    "recited: share of prompts, with its 95 % interval over documents or sections; in runs: share of bytes in runs of 48 or more that are recited, as the guard "
    "of the nights measures it"
)
RECITED = "A prompt is recited when so many tokens after it come from greedy decoding as they stand in the text (Carlini et al. 2023)."


def summarize(results: Results) -> Summary:
    rows = results.table()
    last = rows.sort_values("step").groupby("cell", sort=False).tail(1)
    oldest = pd.DataFrame([_overall(arm, last[last["arm"] == arm]) for arm in results.arms])
    findings = [_sentence(row, last[last["arm"] == row["arm"]]) for _, row in oldest.iterrows()]
    conclusion = findings.pop(int(oldest["memorized"].to_numpy().argmax()))
    curves = pd.concat([_curve(rows, split) for split in TEXTS], ignore_index=True)
    blocks = [
        figure(
            curves_figure(
                curves, x="tokens_seen", y="recited", by="text", x_title="training tokens", y_title="recited prompts (%)"
            ),
            "Recited by age",
            "Prompts that greedy decoding continues word for word; one line a seed. What is recited of held-out text is no memory, but "
            "text that is easy to guess.",
            alt="Share of recited prompts of training and held-out text over the training",
        ),
        table("At the end of training", oldest, "means over seeds with 95 % intervals", styles=STYLES),
        page.collapsible(
            "Every age of every training",
            table("Every age", rows.drop(columns=["cell", "step"]), CAPTION, styles=STYLES, notes=[RECITED]),
        ),
    ]
    metrics = {f"memorization/memorized/{row['arm']}": float(row["memorized"]) for _, row in oldest.iterrows()}
    return Summary(conclusion, findings, blocks, {"oldest": oldest}, metrics)


def _overall(arm: str, last: pd.DataFrame) -> dict[str, object]:
    """An arm's trainings at their end: means over seeds, and what is recited of training text beyond held-out text."""
    row: dict[str, object] = {"arm": arm, "n": len(last), "passes": last["passes"].mean()}
    for name in ("train_bpb", "val_bpb"):
        row |= mean_interval(last[name]).columns(name)
    for name in ("train_recited", "val_recited"):
        found = mean_interval(last[name])
        # Student's t of a few seeds knows nothing of where a share ends.
        row |= replace(found, low=np.maximum(found.low, 0), high=np.minimum(found.high, 1)).columns(name)
    return row | mean_interval(last["train_recited"] - last["val_recited"]).columns("memorized")


def _sentence(row: pd.Series, last: pd.DataFrame) -> str:
    held_out = f"and {100 * row['val_recited']:.1f} % of those from held-out text"
    return (
        f"After {row['passes']:.3g} passes over its training text, the model of {row['arm']} recites "
        f"{_share(row, last)} of prompts from it word for word for {last['recited_tokens'].iloc[0]} tokens, {held_out}."
    )


def _share(row: pd.Series, last: pd.DataFrame) -> str:
    """Over seeds; with one seed, the spread that is left is that over prompts."""
    value, low, high = (100 * row[f"train_recited{end}"] for end in ("", "_low", "_high"))
    if row["n"] == 1 and "train_recited_low" in last:
        low, high = 100 * last["train_recited_low"].iloc[0], 100 * last["train_recited_high"].iloc[0]
        if pd.notna(low):
            return f"{value:.1f} % (n=1, 95 % interval over prompts {low:.1f} to {high:.1f} %)"
    return Interval(value, low, high, row["n"]).text(".1f", "%")


def _curve(rows: pd.DataFrame, split: str) -> pd.DataFrame:
    names = rows["arm"] + ", " + TEXTS[split]
    curve = rows[["seed", "tokens_seen"]].assign(text=names, recited=100 * rows[f"{split}_recited"])
    return curve.sort_values("tokens_seen")

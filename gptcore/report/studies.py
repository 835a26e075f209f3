"""Studies in the report of a run: the result of a short form → a table and its conclusion, for any study, and what a run's time went to.

The columns come from the rows themselves; a number `x` beside `x_low` and `x_high` is shown with its range, as in
`5,120 (5,040–5,300)`.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from markupsafe import Markup

from gptcore.report import page
from gptcore.report.record import RunRecord, StepRecord, study_rows, training_speed
from gptcore.report.study import text_columns, texts
from gptcore.report.wording import number, short_count

TIMING = "timing"  # its sections divide the time of the training
LABELS = {
    "ms": "ms",
    "share": "share",
    "size_mib": "size (MiB)",
    "val_bpb": "bits per byte",
    "bpb_delta": "Δ bits per byte",
    "tok_per_sec": "tok/s",
    "grad_accum_steps": "micro-steps",
    "micro_batch_size": "sequences in each",
    "grad_difference": "gradient difference",
    "peak_mib": "peak memory (MiB)",
}
STYLES = {
    "share": "%",
    "val_bpb": ".4f",
    "bpb_delta": "+.4f",
    "ms": ",.1f",
    "tok_per_sec": ",.0f",
    "peak_mib": ",.1f",
    "size_mib": ",.2f",
}


def study_block(step: StepRecord) -> Markup:
    """Title, table and conclusion of a study; its reason where it failed."""
    title = str(step.result.get("title") or step.name.replace("_", " "))
    if step.status == "failed":
        return page.subsection(title, page.callout("This study failed.", step.reason))
    blocks = [page.paragraph(str(step.result["conclusion"]))] if step.result.get("conclusion") else []
    rows = [_named_ranges(row) for row in study_rows(step)]
    if rows:
        bars = {"share": [row.get("share", math.nan) for row in rows]} if "share" in rows[0] else None
        words = text_columns(pd.DataFrame(rows, dtype=object), LABELS)
        caption = str(step.result.get("caption") or "measured on this run's model and device")
        blocks.append(page.html_table(study_frame(rows), caption, text_columns=words, bars=bars))
    return page.subsection(title, *blocks)


def rnn_block(run: RunRecord) -> Markup:
    """The LSTM beside the model, in a sentence: both are trainings, so their numbers stand in the comparison."""
    rnn, train = run.steps["rnn"], run.done("train")
    if rnn.status == "failed":
        return page.subsection("LSTM baseline", page.callout("This study failed.", rnn.reason))
    if rnn.status != "done" or train is None:
        return Markup()
    ours, theirs = train.number("val_bpb"), rnn.number("val_bpb")
    sizes = f"{number(rnn.number('parameters'), ',.0f')} parameters against {number(train.number('parameters'), ',.0f')}, {short_count(rnn.number('tokens_seen'))} tokens against {short_count(train.number('tokens_seen'))}"
    if ours is None or theirs is None:
        return Markup()
    words = "ahead of" if ours < theirs else "behind"
    speed, base = training_speed(train), training_speed(rnn)
    pace = f" It trains at {base:,.0f} tok/s, the {run.model_name} at {speed:,.0f}." if speed and base else ""
    text = f"With {sizes}, the {run.model_name} is {abs(theirs - ours):.3f} bits per byte {words} the LSTM ({ours:.3f} and {theirs:.3f}; n = 1 of each).{pace}"
    return page.subsection("LSTM baseline", page.paragraph(text))


def study_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows of numbers → a table of texts, `n` last."""
    frame = pd.DataFrame(rows, dtype=object)  # whole numbers stay whole where a row has none
    return texts(frame[sorted(frame.columns, key=lambda column: column == "n")], STYLES, LABELS, "–")


def time_parts(run: RunRecord) -> pd.DataFrame:
    """Seconds of every pipeline step, with training divided by the timing study (columns step, part, seconds).

    The study's shares hold for the time spent in steps, which is tokens ÷ (tok/s) summed over the reports; what remains of the
    training process is start-up, validation and saving.
    """
    parts: list[tuple[str, str, float]] = []
    for name, seconds in run.seconds.items():
        sections = _section_shares(run.done(TIMING)) if name == "train" else {}
        stepping = min(_stepping_seconds(run.steps["train"]), seconds) if sections else 0.0
        if not stepping:
            parts.append((name, "", seconds))
            continue
        parts += [(name, section, share * stepping) for section, share in sections.items()]
        parts.append((name, "start-up, validation, saving", seconds - sum(sections.values()) * stepping))
    return pd.DataFrame(parts, columns=["step", "part", "seconds"])


def _section_shares(timing: StepRecord | None) -> dict[str, float]:
    """Each section's share of a step, at most 1 together."""
    if timing is None:
        return {}
    times = {
        str(row.get("section")): row["ms"]
        for row in study_rows(timing)
        if isinstance(row.get("ms"), (int, float)) and row["ms"] > 0
    }
    whole = max(timing.number("wall_ms") or 0.0, sum(times.values()))
    return {name: ms / whole for name, ms in times.items()}


def _stepping_seconds(train: StepRecord) -> float:
    speed = train.series("perf/tok_per_sec")
    if speed.empty:
        return 0.0
    tokens = pd.Series(speed.index, index=speed.index, dtype=float).diff().fillna(float(speed.index[0]))
    return float((tokens / speed).sum())


def _named_ranges(row: dict[str, Any]) -> dict[str, Any]:
    """The timing study says low and high of its one measured number, ms; elsewhere the names say what they belong to."""
    names = {"low": "ms_low", "high": "ms_high"} if "ms" in row else {}
    return {names.get(key, key): value for key, value in row.items()}

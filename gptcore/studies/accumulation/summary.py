"""What the accumulation study's cells say together: three answers, each from its own rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from gptcore.report import page
from gptcore.report.figures import PARTS
from gptcore.report.study import curves_figure, figure, interval_figure, table
from gptcore.studies import Draft, Results, Summary
from gptcore.studies.statistics import comparison_note, mean_interval, paired, ratio_interval

COUNTS = ("micro_steps", "micro_batch_size", "repeats")  # floats where other kinds of cells have no such column
ROUNDING = 1e-12  # float64: hundreds of thousands of terms, each rounded to 1e-16
METHODS = (
    "ours: sums divided by the batch's number of targets. naive: the mean of the micro-batches' means. Full batches have as many "
    "targets in every micro-batch, so there the two agree."
)
CHOICE = (
    "The learning rate of each arm is the best of those tried, on the mean over seeds. A small batch sees more updates; its rescaled "
    "beta2 averages squared gradients over as many tokens as the large batch's (Marek et al. 2025)."
)


def summarize(results: Results) -> Summary:
    """One part for each kind of cell that has numbers."""
    rows = results.table()
    draft = Draft()
    for kind, part in (("exactness", _exactness), ("economy", _economy)):
        own = rows[rows["kind"] == kind].dropna(axis=1, how="all")
        if len(own):
            part(own.astype({column: int for column in COUNTS if column in own}), draft)
    if (rows["kind"] == "learning").any():
        _learning(results, rows[rows["kind"] == "learning"], draft)
    return draft.summary()


def _exactness(rows: pd.DataFrame, draft: Draft) -> None:
    exact = rows[(rows["precision"] == "fp64") & (rows["method"] != "naive")]
    worst, n, most = float(exact["error"].max()), exact["seed"].nunique(), int(rows["micro_steps"].max())
    ranks = exact["method"].str.contains("processes").any()
    draft.metrics["accumulation/error_fp64"] = worst
    verdict = "is" if worst < ROUNDING else "is not"
    draft.findings.append(
        f"In float64 the gradient of a batch in up to {most} micro-steps{' and over two processes' if ranks else ''} {verdict} the batch's own "
        f"to rounding: the largest relative difference on full, ragged and masked batches is {worst:.1e} (n={n} seeds)."
    )
    naive = rows[(rows["method"] == "naive") & (rows["precision"] == "fp64") & (rows["micro_steps"] == most)]
    for batch in ("ragged", "masked"):
        own = naive[naive["batch"] == batch]
        if len(own):
            interval = mean_interval(100 * own["error"])
            draft.metrics[f"accumulation/error_naive_{batch}"] = interval.mean / 100
            draft.findings.append(
                f"The naive mean of the micro-batches' means is off by {interval.text('.3g', '%')} of the gradient on {batch} "
                f"batches in {most} micro-steps."
            )
    low = rows[(rows["precision"] == "bf16") & (rows["method"] == "ours") & (rows["micro_steps"] == most)]
    if len(low):
        drift = mean_interval(100 * low.groupby("seed")["drift"].mean())
        draft.metrics["accumulation/drift_bf16"] = drift.mean / 100
        error = mean_interval(100 * low.groupby("seed")["error"].mean())
        draft.findings.append(
            f"In bf16, {most} micro-steps move the gradient by {drift.text('.3g', '%')}; bf16 itself is {error.mean:.3g} % "
            "away from float64."
        )
    keys = ["precision", "batch", "method", "micro_steps"]
    grouped = [
        {**dict(zip(keys, key, strict=True)), **mean_interval(own["error"]).columns("error"), "n": own["seed"].nunique()}
        for key, own in rows.groupby(keys, sort=False)
    ]
    frame = pd.DataFrame(grouped)
    draft.tables["exactness"] = frame
    caption = "Relative distance to the float64 gradient of the whole batch, mean over seeds; both axes logarithmic."
    caption += " Click a name to hide it."
    alt = "Error of the gradient by number of micro-steps, for each precision and method"
    draft.blocks.append(figure(_error_figure(frame), "Distance to the exact gradient", caption, alt=alt, height=460))
    most_rows = frame[(frame["micro_steps"] == most) | frame["method"].str.contains("processes")]
    caption = "relative distance to the float64 gradient of the whole batch: mean (95 % interval)"
    styles = {"error": ".2e", "micro_steps": "d"}
    draft.blocks.append(table(f"The gradient in {most} micro-steps", most_rows, caption, styles=styles, notes=[METHODS]))


def _economy(rows: pd.DataFrame, draft: Draft) -> None:
    # Of several arms (say, two widths) each has its own curve; the sentence is about the first.
    frame = pd.DataFrame(
        [
            {
                "arm": arm,
                "micro_batch_size": size,
                "micro_steps": int(own["micro_steps"].iloc[0]),
                "peak_mib": float(own["peak_mib"].mean()),
                **mean_interval(own["tok_per_sec"]).columns("tok_per_sec"),
                "n": own["seed"].nunique(),
                "repeats": int(own["repeats"].iloc[0]),
            }
            for (arm, size), own in rows.groupby(["arm", "micro_batch_size"], sort=False)
        ]
    )
    draft.tables["economy"] = frame
    first = rows[rows["arm"] == rows["arm"].iloc[0]]
    whole, least = int(first["micro_batch_size"].max()), int(first["micro_batch_size"].min())
    wide = first.pivot_table(index="seed", columns="micro_batch_size", values=["tok_per_sec", "peak_mib"])
    speed = ratio_interval(wide["tok_per_sec"][least] / wide["tok_per_sec"][whole])
    memory = float((wide["peak_mib"][least] / wide["peak_mib"][whole]).mean())
    best = first.groupby("micro_batch_size")["tok_per_sec"].mean().idxmax()
    draft.metrics |= {"accumulation/speed_ratio": speed.mean, "accumulation/memory_ratio": memory}
    draft.findings.append(
        f"Micro-batches of {least} instead of {whole} sequences keep {100 * memory:.0f} % of the activations and run at "
        f"{speed.text('.2f', 'times')} the speed; the fastest size here is {best}."
    )
    plot = go.Figure()
    for i, (arm, own) in enumerate(frame.groupby("arm", sort=False)):
        plot.add_scatter(
            x=list(own["peak_mib"]),
            y=list(own["tok_per_sec"]),
            name=str(arm),
            mode="lines+markers+text",
            text=[str(size) for size in own["micro_batch_size"]],
            textposition="top center",
            line={"color": PARTS[i % len(PARTS)]},
            hovertemplate="micro-batch %{text}: %{x:.1f} MiB, %{y:,.0f} tok/s<extra></extra>",
        )
    plot.update_xaxes(title="activations kept for the backward pass, MiB", type="log")
    plot.update_yaxes(title="tok/s", rangemode="tozero")
    caption = "Each point is a micro-batch size (its label) at the same tokens a step."
    alt = "Speed over activation memory for each micro-batch size"
    draft.blocks.append(figure(plot, "Memory against speed", caption, alt=alt))
    caption = (
        "gradients of one step at constant tokens a step; tok/s: mean over seeds of the median of the rounds (95 % interval)"
    )
    styles = {"peak_mib": ",.1f", "tok_per_sec": ",.0f"}
    draft.blocks.append(table("What a micro-batch costs", frame, caption, styles=styles))


def _learning(results: Results, rows: pd.DataFrame, draft: Draft) -> None:
    arms = [arm for arm in results.arms if (rows["arm"] == arm).any()]
    means = rows.groupby(["arm", "lr"])["val_bpb"].mean()
    chosen = {arm: means[arm].idxmin() for arm in arms}  # over all seeds, so that no seed picks its own luck
    best = pd.concat([rows[(rows["arm"] == arm) & (rows["lr"] == lr)] for arm, lr in chosen.items()])
    curves = results.table("curves")
    curves = pd.concat([curves[(curves["arm"] == arm) & (curves["lr"] == lr)] for arm, lr in chosen.items()])
    for arm, lr in chosen.items():
        tried = sorted(means[arm].index)
        if len(tried) > 1 and lr in (tried[0], tried[-1]):
            draft.findings.append(
                f"The best learning rate of {arm}, {lr:g}, is at the edge of those tried ({tried[0]:g} to {tried[-1]:g}): beyond it "
                "this arm may be better still."
            )
    limit = float(best["train_seconds"].min())
    lines = curves.groupby(["arm", "seed"], sort=False)
    # Between a curve's neighbours at that time; its first value where it begins later.
    values = [(*key, float(np.interp(limit, own["seconds"], own["val_bpb"]))) for key, own in lines]
    at_time = pd.DataFrame(values, columns=["arm", "seed", "val_bpb"])
    draft.tables |= {"learning": best, "learning_rates": rows, "curves": curves}
    reference = arms[0]
    tokens = paired(best, "val_bpb", reference)
    at_equal_time = paired(at_time, "val_bpb", reference)
    for comparison, key, what in (
        (tokens, "tokens", "equal tokens"),
        (at_equal_time, "time", f"equal time ({limit:.1f} s of steps)"),
    ):
        for _, row in comparison.iterrows():
            word = "better" if row["difference"] < 0 else "worse"
            if row["n"] < 2:
                how_sure = "n=1: one seed cannot tell this from luck"
            else:
                how_sure = f"n={row['n']}, 95 % interval of the difference {row['low']:+.4f} to {row['high']:+.4f}"
                how_sure += "" if row["low"] * row["high"] > 0 else ": no difference at this n"
            draft.findings.append(
                f"At {what}, {row['arm']} is {abs(row['difference']):.4f} bits per byte {word} than {reference} ({how_sure})."
            )
            slug = "".join(c if c.isalnum() else "_" for c in row["arm"])
            draft.metrics[f"accumulation/{key}_bpb_{slug}"] = row["difference"]
    summary = pd.DataFrame(
        [
            {
                "arm": arm,
                "sequences_a_step": int(own["global_batch_size"].iloc[0]),
                "beta2": float(own["beta2"].iloc[0]),
                "lr": chosen[arm],
                **mean_interval(own["val_bpb"]).columns("val_bpb"),
                **mean_interval(at_time[at_time["arm"] == arm]["val_bpb"]).columns("at_equal_time"),
                "tokens": int(own["tokens"].iloc[0]),
                "seconds_of_steps": float(own["train_seconds"].mean()),
                "n": own["seed"].nunique(),
            }
            for arm, own in best.groupby("arm", sort=False)
        ]
    )
    draft.tables["learning_summary"] = summary
    caption = "bits per byte on the validation split at equal tokens and at equal time: mean (95 % interval)"
    styles = {"val_bpb": ".4f", "at_equal_time": ".4f", "beta2": ".5f", "seconds_of_steps": ".1f", "lr": "g"}
    notes = [comparison_note(tokens, reference), CHOICE]
    draft.blocks.append(table("Does accumulation learn better?", summary, caption, styles=styles, notes=notes))
    if len(tokens):
        plot = interval_figure(tokens, f"bits per byte minus {reference}'s")
        caption, alt, height = (
            "Seeds paired; below zero is better.",
            "Difference of bits per byte by arm",
            120 + 60 * len(tokens),
        )
        draft.blocks.append(figure(plot, "Difference at equal tokens", caption, alt=alt, height=height))
    panels = []
    for x, title, name in (("tokens", "tokens", "At equal tokens"), ("seconds", "seconds of steps", "At equal time")):
        plot = curves_figure(curves, x=x, y="val_bpb", by="arm", x_title=title, y_title="bits per byte")
        panels.append(figure(plot, name, "One line a seed.", alt=f"Validation bits per byte over {title}", height=380))
    draft.blocks.append(page.figure_row(*panels))


def _error_figure(frame: pd.DataFrame) -> go.Figure:
    plot = go.Figure()
    precisions = list(dict.fromkeys(frame["precision"]))
    for key, own in frame.groupby(["precision", "batch", "method"], sort=False):
        precision, batch, method = map(str, key)
        if "processes" in method or (method == "naive" and precision != "fp64"):
            continue
        plot.add_scatter(
            x=list(own["micro_steps"]),
            y=[max(e, 1e-17) for e in own["error"]],
            name=f"{precision} {batch}, {method}",
            mode="lines+markers",
            line={
                "color": PARTS[(precisions.index(precision) + 3 * (method == "naive")) % len(PARTS)],
                "dash": {"full": "solid", "ragged": "dash", "masked": "dot"}[batch],
            },
            hovertemplate="%{x} micro-steps: %{y:.2e}",
        )
    plot.update_xaxes(title="micro-steps", type="log", tickvals=sorted(frame["micro_steps"].unique()))
    plot.update_yaxes(title="relative distance", type="log", exponentformat="power")
    return plot

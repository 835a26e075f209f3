"""What the timing study's cells say together: the map of the whole, the inside of a step, what limits it, what to change."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from gptcore.report import page
from gptcore.report.figures import COLOURS, PARTS
from gptcore.report.study import figure, interval_figure, table
from gptcore.report.wording import duration
from gptcore.studies import Draft, Results, Summary
from gptcore.studies.statistics import comparison_note, mean_interval, paired
from gptcore.studies.timing.advice import advise_pipeline, advise_step, largest_other


def summarize(results: Results) -> Summary:
    """The pipeline's part and the step's part, each where it has numbers."""
    rows = results.table()
    draft = Draft()
    pipeline = rows[rows["kind"] == "pipeline"].dropna(axis=1, how="all")
    if len(pipeline):
        _pipeline(results, pipeline, draft)
    steps = rows[rows["kind"] == "step"].dropna(axis=1, how="all")
    if len(steps):
        _steps(results, steps, draft)
    return draft.summary()


# --- the whole ------------------------------------------------------------------------------------------------------------


def _pipeline(results: Results, rows: pd.DataFrame, draft: Draft) -> None:
    facts = results.table("facts")
    not_training = mean_interval(100 * facts["not_training"])
    wall = mean_interval(facts["wall_seconds"])
    gap = float((facts["mapped_seconds"] / facts["wall_seconds"] - 1).abs().max())
    draft.metrics |= {"timing/not_training": not_training.mean / 100, "timing/wall_seconds": wall.mean}
    mean = rows.groupby("section", sort=False)[["seconds", "share", "calls", "cpu_seconds"]].mean().reset_index()
    inclusive = inclusive_shares(mean)
    largest = largest_other(inclusive)
    draft.findings.append(
        f"{not_training.text('.1f', '%')} of the time from raw text to report trains nothing; the whole takes {duration(wall.mean)}, "
        f"and {largest} is the largest part beside training with {100 * inclusive[largest]:.0f} %."
    )
    draft.findings.append(f"The map's sections add up to the wall time of another clock within {100 * gap:.2f} % (n={wall.n}).")
    busy = mean_interval(100 * facts["cpu_seconds"] / (facts["wall_seconds"] * facts["threads"]))
    draft.findings.append(
        f"This process kept its {int(facts['threads'].max())} threads busy for {busy.text('.0f', '%')} of that time; the rest is idle, or the work of child processes."
    )
    draft.findings += advise_pipeline(inclusive, not_training.mean / 100)
    draft.tables["map"] = rows
    caption = "Angle is time: click a part to look inside it, click the middle to go back. Mean over seeds."
    alt = "Sunburst of the pipeline's time by section"
    draft.blocks.append(figure(sunburst(mean), "The whole pipeline", caption, alt=alt, height=560))
    caption, alt = "Width is time; each row is one level further inside.", "Icicle of the pipeline's time"
    draft.blocks.append(figure(icicle(mean), "The same as a flame view", caption, alt=alt, height=340))
    draft.blocks.append(page.collapsible("every section of the map", _map_table(rows)))
    memory = results.table("memory")
    memory = memory[memory["kind"] == "pipeline"] if "kind" in memory else memory
    if len(memory):
        draft.blocks.append(_memory_of_pipeline(memory))


def inclusive_shares(mean: pd.DataFrame) -> dict[str, float]:
    """Share of the whole by section, with all that is inside it; names without the root. `mean`: columns section, seconds."""
    total = float(mean["seconds"].sum())
    inner = mean.assign(section=[str(section).partition(" / ")[2] for section in mean["section"]])
    return {key: seconds / total for key, seconds in _inclusive(inner[inner["section"] != ""]).items()}


def _inclusive(mean: pd.DataFrame) -> dict[str, float]:
    """Seconds of every section and of all above it, with what is inside."""
    totals: dict[str, float] = {}
    for section, seconds in zip(mean["section"], mean["seconds"], strict=True):
        parts = section.split(" / ")
        for depth in range(1, len(parts) + 1):
            key = " / ".join(parts[:depth])
            totals[key] = totals.get(key, 0.0) + seconds
    return totals


def nodes(mean: pd.DataFrame) -> pd.DataFrame:
    """A tree for plotly: id, label, parent, seconds (all inside included); a section's own time inside it is called `itself`."""
    own, totals = dict(zip(mean["section"], mean["seconds"], strict=True)), _inclusive(mean)
    inner = {key.rpartition(" / ")[0] for key in totals}
    itself = [f"{key} / itself" for key in totals if key in inner and own.get(key, 0.0) > 0]
    names = [*totals, *itself]
    return pd.DataFrame(
        {
            "id": names,
            "label": [name.rpartition(" / ")[2] for name in names],
            "parent": [name.rpartition(" / ")[0] for name in names],
            "seconds": [*totals.values(), *(own[name.removesuffix(" / itself")] for name in itself)],
        }
    )


def sunburst(mean: pd.DataFrame) -> go.Figure:
    looks = {"maxdepth": 4, "insidetextorientation": "auto", "sort": True, "leaf": {"opacity": 0.85}}
    return go.Figure(go.Sunburst(**_tree(mean), **looks))


def icicle(mean: pd.DataFrame) -> go.Figure:
    return go.Figure(go.Icicle(**_tree(mean), tiling={"orientation": "v", "flip": "y"}, pathbar={"visible": False}))


def _tree(mean: pd.DataFrame) -> dict[str, Any]:
    """What both views of the tree have in common; one colour per first-level part, for all that is inside it."""
    tree = nodes(mean)
    firsts = list(tree["id"][(tree["parent"] != "") & ~tree["parent"].str.contains(" / ")])
    parts = [" / ".join(key.split(" / ")[:2]) for key in tree["id"]]
    colours = [PARTS[firsts.index(part) % len(PARTS)] if part in firsts else COLOURS["reference"] for part in parts]
    return {
        "ids": list(tree["id"]),
        "labels": list(tree["label"]),
        "parents": list(tree["parent"]),
        "values": list(tree["seconds"]),
        "branchvalues": "total",
        "marker": {"colors": colours},
        "hovertemplate": "%{id}<br>%{value:.3f} s, %{percentRoot:.1%} of all<extra></extra>",
    }


def _map_table(rows: pd.DataFrame) -> str:
    frame = pd.DataFrame(
        [
            {
                "section": str(section).partition(" / ")[2] or "pipeline itself",
                **mean_interval(own["seconds"]).columns("seconds"),
                "share": 100 * float(own["share"].mean()),
                "calls": int(own["calls"].median()),
                "cpu_seconds": float(own["cpu_seconds"].mean()),
                "n": len(own),
            }
            for section, own in rows.groupby("section", sort=False)
        ]
    ).sort_values("seconds", ascending=False)
    caption = "without what is inside them: mean over seeds (95 % interval); processor seconds of this process"
    styles = {"seconds": ".3f", "share": ".1f", "cpu_seconds": ".3f"}
    return table("Sections, own time", frame, caption, styles=styles)


def _memory_of_pipeline(memory: pd.DataFrame) -> str:
    plot = go.Figure()
    for i, (seed, own) in enumerate(memory.groupby("seed", sort=False)):
        plot.add_scatter(
            x=list(own["seconds"]),
            y=list(own["mib"]),
            name=f"seed {seed}",
            mode="lines+markers",
            text=list(own["after"]),
            line={"color": PARTS[i % len(PARTS)]},
            hovertemplate="after %{text}: %{y:,.0f} MiB at %{x:.1f} s<extra></extra>",
        )
    plot.update_xaxes(title="seconds from the start")
    plot.update_yaxes(title="MiB held", rangemode="tozero")
    caption = "Resident set of the process on a CPU, allocated device memory on a GPU."
    return figure(plot, "Memory after each part", caption, alt="Memory over time", height=300)


ARM_STYLES = {
    **dict.fromkeys(("of_peak", "of_bandwidth", "busy"), ".0f"),
    **dict.fromkeys(("tok_per_sec", "peak_mib", "us_per_operator"), ",.0f"),
    **{"step_ms": ",.1f", "mfu": ".1f", "intensity": ".1f"},
}
ARM_NOTE = (
    "of peak: arithmetic (6N + attention a token) against one large product in the same precision, in %; of bandwidth: bytes of unfused "
    "operators against one large copy, in % (above 100 where caches serve them); intensity: FLOP a byte."
)
TRACE_NOTE = (
    "Every step cell keeps a trace of one step, operator by operator (trace.json.gz in its folder and in MLflow): open it at "
    "ui.perfetto.dev or chrome://tracing."
)


# --- inside a step --------------------------------------------------------------------------------------------------------


def _steps(results: Results, rows: pd.DataFrame, draft: Draft) -> None:
    rows = against_best_peaks(rows)
    arms = [arm for arm in results.arms if (rows["arm"] == arm).any()]
    # The grid's points are arms of their own here.
    baseline = results.plan.baseline if results.plan.baseline in arms else arms[0]
    sections = results.table("sections")
    base_rows, base_sections = rows[rows["arm"] == baseline], sections[sections["arm"] == baseline]
    shares = base_sections.groupby("section", sort=False)["share"].sum() / base_sections["seed"].nunique()
    top = str(shares.idxmax())
    step = mean_interval(base_rows["step_ms"])
    draft.metrics |= {"timing/step_ms": step.mean, "timing/of_peak": float(base_rows["of_peak"].mean())}
    draft.findings.append(
        f"A training step ({baseline}) takes {step.text('.1f', 'ms')}, most of it in {top} ({100 * shares[top]:.0f} %), and reaches "
        f"{100 * base_rows['of_peak'].mean():.0f} % of the arithmetic that one large product reaches on this device."
    )
    draft.findings.append(
        f"The clock itself makes a step {100 * base_rows['clock_cost'].mean():+.1f} % longer, the profiler {100 * base_rows['profiler_cost'].mean():+.0f} %; "
        f"on the same step the two clocks differ by {100 * base_rows['profiler_gap'].mean():.1f} %."
    )
    facts = dict(base_rows.mean(numeric_only=True)) | {key: _mean_or_none(base_rows, key) for key in ("kernels", "busy_share")}
    draft.findings += advise_step(facts, {str(section): share for section, share in shares.items()})
    speed = paired(rows, "tok_per_sec", baseline, ratio=True)
    draft.tables |= {"steps": rows, "sections": sections, "speed": speed}
    for _, row in speed[speed["certain"]].iterrows():
        word = "faster" if row["difference"] > 1 else "slower"
        factor = row["difference"] if row["difference"] > 1 else 1 / row["difference"]
        draft.findings.append(
            f"{row['arm']} is {factor:.2f} times {word} than {baseline} in tokens per second (n={row['n']}, 95 % interval of the ratio {row['low']:.2f} to {row['high']:.2f})."
        )
    caption = "Milliseconds a step by section, mean over seeds; click a name to hide it."
    alt, height = "Stacked bars of a step's sections for each arm", 140 + 40 * len(arms)
    draft.blocks.append(figure(stacked(sections, arms), "Inside a training step", caption, alt=alt, height=height))
    caption = "undisturbed steps: mean over seeds (95 % interval) of the median of the repeats"
    draft.blocks.append(table("Arms", _arm_frame(rows, arms), caption, styles=ARM_STYLES, notes=[ARM_NOTE]))
    if len(speed):
        plot = interval_figure(speed, f"tokens per second ÷ {baseline}'s", reference=1.0)
        caption = "Seeds paired, 95 % intervals; right of the line is faster."
        alt, height = "Ratio of tokens per second by arm", 120 + 36 * len(speed)
        draft.blocks.append(figure(plot, "Speed against the base", caption, alt=alt, height=height))
        draft.blocks.append(page.paragraph(comparison_note(speed, baseline), "tablenote"))
    caption = "Each point is an arm; the roof is what one large copy and one large product reach here. Both axes logarithmic."
    draft.blocks.append(figure(roofline(rows, arms), "Under the roofline", caption, alt="Roofline plot"))
    memory = results.table("memory")
    memory = memory[(memory["kind"] == "step") & (memory["arm"] == baseline)]
    if len(memory):
        draft.blocks.append(_memory_of_step(memory[memory["seed"] == memory["seed"].iloc[0]]))
    draft.blocks.append(page.paragraph(TRACE_NOTE))


def against_best_peaks(rows: pd.DataFrame) -> pd.DataFrame:
    """Shares of the peaks anew, against the best that any cell of the same device and precision reached: a neighbour on the machine
    can only make a peak too low, and what one cell reached the device can do.
    """
    rows, kind = rows.copy(), [rows["device"], rows["precision"]]
    rows["peak_flops"] = rows.groupby(kind)["peak_flops"].transform("max")
    rows["peak_bandwidth"] = rows.groupby(rows["device"])["peak_bandwidth"].transform("max")
    rows["of_peak"] = rows["flops_per_sec"] / rows["peak_flops"]
    rows["of_bandwidth"] = rows["bytes_per_sec"] / rows["peak_bandwidth"]
    rows["ridge"] = rows["peak_flops"] / rows["peak_bandwidth"]
    return rows


def _arm_frame(rows: pd.DataFrame, arms: list[str]) -> pd.DataFrame:
    def percent(own: pd.DataFrame, key: str) -> float | None:
        value = _mean_or_none(own, key)
        return None if value is None else 100 * value

    frame = pd.DataFrame(
        [
            {
                "arm": arm,
                **mean_interval(own["step_ms"]).columns("step_ms"),
                **mean_interval(own["tok_per_sec"]).columns("tok_per_sec"),
                "of_peak": percent(own, "of_peak"),
                "mfu": percent(own, "mfu"),
                "of_bandwidth": percent(own, "of_bandwidth"),
                "intensity": float(own["intensity"].mean()),
                "busy": percent(own, "busy_share"),
                "kernels": _mean_or_none(own, "kernels"),
                "operators": int(own["operators"].median()),
                "us_per_operator": float(own["us_per_operator"].mean()),
                "peak_mib": _mean_or_none(own, "peak_mib"),
                "n": len(own),
            }
            for arm in arms
            if len(own := rows[rows["arm"] == arm])
        ]
    )
    return frame.dropna(axis=1, how="all")


def stacked(sections: pd.DataFrame, arms: list[str]) -> go.Figure:
    """Horizontal bars, one per arm, stacked from its sections, the largest of all first."""
    mean = sections.groupby(["arm", "section"], sort=False)["ms"].sum() / sections.groupby("arm")["seed"].nunique()
    order = sections.groupby("section")["ms"].sum().sort_values(ascending=False).index
    plot = go.Figure()
    for i, section in enumerate(order):
        plot.add_bar(
            y=arms,
            x=[float(mean.get((arm, section), 0.0)) for arm in arms],
            name=str(section),
            orientation="h",
            marker={"color": PARTS[i % len(PARTS)], "opacity": 1.0 if i < len(PARTS) else 0.6},
            hovertemplate=f"%{{y}}: {section} %{{x:.2f}} ms<extra></extra>",
        )
    plot.update_layout(barmode="stack", legend={"traceorder": "normal"})
    plot.update_xaxes(title="ms a step")
    plot.update_yaxes(autorange="reversed")
    return plot


def roofline(rows: pd.DataFrame, arms: list[str]) -> go.Figure:
    """A point for each arm under the roof of its own device and precision."""
    mean = rows.groupby("arm")[["intensity", "flops_per_sec"]].mean()
    low = min(float(mean["intensity"].min()), float(rows["ridge"].min())) / 3
    high = max(float(mean["intensity"].max()), float(rows["ridge"].max())) * 3
    plot = go.Figure()
    for i, (key, own) in enumerate(rows.groupby(["device", "precision"], sort=False)):
        peak, bandwidth = float(own["peak_flops"].max()), float(own["peak_bandwidth"].max())
        name, colour = ", ".join(map(str, key)), PARTS[i % len(PARTS)]
        plot.add_scatter(
            x=[low, peak / bandwidth, high],
            y=[low * bandwidth, peak, peak],
            mode="lines",
            name=f"roof, {name}",
            line={"color": colour, "width": 2},
            hoverinfo="skip",
        )
        mine = [arm for arm in arms if (own["arm"] == arm).any()]
        plot.add_scatter(
            x=[float(mean["intensity"][arm]) for arm in mine],
            y=[float(mean["flops_per_sec"][arm]) for arm in mine],
            text=mine,
            mode="markers+text",
            textposition="bottom center",
            marker={"size": 10, "color": colour},
            showlegend=False,
            hovertemplate="%{text}: %{x:.1f} FLOP/byte, %{y:.3s}FLOP/s<extra></extra>",
        )
    plot.update_xaxes(title="FLOP per byte", type="log")
    plot.update_yaxes(title="FLOP per second", type="log", exponentformat="SI")
    return plot


def _memory_of_step(memory: pd.DataFrame) -> str:
    plot = go.Figure()
    plot.add_scatter(
        x=list(memory["ms"]),
        y=list(memory["mib"]),
        mode="lines",
        fill="tozeroy",
        line={"color": PARTS[0]},
        hovertemplate="%{x:.1f} ms: %{y:.1f} MiB<extra></extra>",
    )
    plot.update_xaxes(title="ms from the step's start, under the profiler")
    plot.update_yaxes(title="MiB allocated", rangemode="tozero")
    caption = "Of the allocator: it climbs through the forward pass and falls through the backward pass."
    return figure(plot, "Memory during a step", caption, alt="Allocated memory over one step", height=300)


def _mean_or_none(rows: pd.DataFrame, key: str) -> float | None:
    if key not in rows or rows[key].isna().all():
        return None
    return float(rows[key].astype(float).mean())

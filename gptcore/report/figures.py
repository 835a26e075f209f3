"""Numbers → plotly figures. Builders know nothing of runs or files, so every report and study can use them.

Text that came from outside is escaped here: plotly reads a small HTML in labels. Backgrounds are transparent and ink
colours come from the page's script, so one figure is readable in light, in dark and on paper.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from gptcore.report.wording import duration

# Told apart by colour-blind readers and at 3:1 or better against both white and near-black.
COLOURS = {"main": "#2f7fd6", "baseline": "#d26b22", "floor": "#2a9270", "reference": "#868b93"}
PARTS = ["#2a72c3", "#b85a15", "#1f7f5f", "#7d57b8", "#b04a70", "#8a6b1f", "#33808f"]  # dark enough for white text
MAX_POINTS = 2000  # of one curve: more cannot be seen, and only makes the file larger


@dataclass(frozen=True)
class Curve:
    """One line of a plot: `values` has x as its index. `role` picks the colour (main, baseline, floor, reference)."""

    name: str
    values: pd.Series
    role: str = "main"
    dash: str = "solid"
    is_thick: bool = True
    in_legend: bool = True


def line_figure(
    curves: Sequence[Curve],
    *,
    x_title: str,
    y_title: str,
    height: int = 420,
    reference: tuple[str, float] | None = None,
    from_zero: bool = False,
) -> go.Figure:
    """Lines over a shared x. `reference` is a labelled horizontal line, e.g. the loss of a uniform guess.

    `from_zero` makes the y-axis start at 0.
    """
    figure = go.Figure(layout_template="none")
    for curve in curves:
        values = thin_out(curve.values)
        # A single point would draw no line; short curves show where they were measured.
        has_markers = len(values) == 1 or (curve.is_thick and len(values) <= 60)
        figure.add_scatter(
            x=[float(x) for x in values.index],
            y=[float(f"{y:.6g}") for y in values],
            name=html.escape(curve.name),
            mode="lines+markers" if has_markers else "lines",
            line={"color": COLOURS[curve.role], "width": 3 if curve.is_thick else 1.2, "dash": curve.dash},
            marker={"size": 6, "color": COLOURS[curve.role]},
            opacity=1.0 if curve.is_thick else 0.55,
            showlegend=curve.in_legend,
            legendgroup=curve.role,  # a click on a model's entry hides its thin line too
            hovertemplate="%{y:.4g}",
        )
    if reference:
        label, level = reference
        figure.add_hline(
            y=level,
            line={"color": COLOURS["reference"], "width": 1.5, "dash": "dash"},
            annotation={"text": html.escape(label), "font": {"size": 12}, "yanchor": "bottom"},
            annotation_position="top right",
        )
    lay_out(figure, height)
    figure.update_layout(hovermode="x unified", showlegend=sum(curve.in_legend for curve in curves) > 1)
    figure.update_xaxes(title=html.escape(x_title), tickformat="~s", hoverformat=",.0f")
    figure.update_yaxes(title=html.escape(y_title), rangemode="tozero" if from_zero else "normal")
    return figure


def thin_out(values: pd.Series, limit: int = MAX_POINTS) -> pd.Series:
    """At most about `limit` points, evenly taken, the last one always among them."""
    stride = -(-len(values) // limit) if len(values) else 1
    picked = values.iloc[::stride]
    return picked if len(values) == 0 or picked.index[-1] == values.index[-1] else pd.concat([picked, values.iloc[-1:]])


def time_figure(parts: pd.DataFrame, *, height: int | None = None) -> go.Figure:
    """Horizontal bars of seconds, one per step in the given order, each stacked from its parts.

    `parts` has the columns step, part and seconds; a part named "" is a step that is not divided further.
    """
    steps = list(dict.fromkeys(parts["step"]))
    totals = parts.groupby("step", sort=False)["seconds"].sum()
    figure = go.Figure(layout_template="none")
    names = list(dict.fromkeys(parts["part"]))
    named = [name for name in names if name]
    for name in names:
        rows = parts[parts["part"] == name]
        colour = PARTS[named.index(name) % len(PARTS)] if name else COLOURS["reference"]
        figure.add_bar(
            x=list(rows["seconds"]),
            y=[html.escape(step) for step in rows["step"]],
            name=html.escape(name),
            orientation="h",
            marker={"color": colour},
            text=[
                f"{100 * seconds / totals[step]:.0f} %" if name else ""
                for step, seconds in zip(rows["step"], rows["seconds"], strict=True)
            ],
            textposition="inside",
            insidetextanchor="middle",
            insidetextfont={"color": "#fff"},
            textangle=0,
            showlegend=bool(name),
            hovertemplate="%{y}: %{x:.3s} s<extra>%{fullData.name}</extra>" if name else "%{y}: %{x:.3s} s<extra></extra>",
        )
    figure.add_scatter(
        x=[float(totals[step]) for step in steps],
        y=[html.escape(step) for step in steps],
        text=[f" {duration(totals[step])}" for step in steps],
        mode="text",
        textposition="middle right",
        showlegend=False,
        hoverinfo="skip",
        cliponaxis=False,
    )
    lay_out(figure, height or 110 + 34 * len(steps))
    figure.update_layout(barmode="stack", bargap=0.28, legend_traceorder="normal", uniformtext={"minsize": 11, "mode": "hide"})
    figure.update_xaxes(title="seconds", range=[0, 1.25 * float(totals.max())])
    figure.update_yaxes(
        autorange="reversed", showgrid=False, categoryorder="array", categoryarray=[html.escape(s) for s in steps]
    )
    return figure


def lay_out(figure: go.Figure, height: int) -> None:
    """Size, margins, fonts and axes that all figures share."""
    figure.update_layout(
        height=height,
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "left", "x": 0},
    )
    figure.update_xaxes(automargin=True, zeroline=False, title_font_size=13)
    figure.update_yaxes(automargin=True, zeroline=False, title_font_size=13)

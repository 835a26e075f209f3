"""The page of a study: question, what was found, its blocks, the state of every cell, the tables beside it. Knows no study.

Study modules make their blocks with `figure`, `table` and `gptcore.report.page`; `write_study_page` puts them together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup

from gptcore.report import page
from gptcore.report.figures import COLOURS, PARTS, lay_out
from gptcore.report.wording import MISSING, duration


def table(
    name: str, frame: pd.DataFrame, caption: str, *, styles: Mapping[str, str] | None = None, notes: Sequence[str] = ()
) -> Markup:
    """A titled table. `styles`: column → format; a column x beside x_low and x_high is shown with its interval.

    A missing number is a dash, True and False are yes and no; columns of text align left.
    """
    shown = texts(frame, styles or {})
    return page.subsection(name, page.html_table(shown, caption, text_columns=text_columns(frame), notes=notes))


def texts(
    frame: pd.DataFrame, styles: Mapping[str, str], labels: Mapping[str, str] | None = None, between: str = " to "
) -> pd.DataFrame:
    """Every value as people read it, ranges joined to their numbers; columns under their labels, else with spaces."""
    ranges = [c for c in frame.columns if f"{c}_low" in frame.columns and f"{c}_high" in frame.columns]
    hidden = {f"{c}{end}" for c in ranges for end in ("_low", "_high")}
    kept = [c for c in frame.columns if c not in hidden]
    rows = frame.to_dict("records")  # iterrows would make every number of a row a float
    return pd.DataFrame(
        {
            label(c, labels): [
                _ranged(row, c, styles.get(c, ""), between) if c in ranges else text(row[c], styles.get(c, "")) for row in rows
            ]
            for c in kept
        }
    )


def text_columns(frame: pd.DataFrame, labels: Mapping[str, str] | None = None) -> list[str]:
    """Labels of the columns with words in them."""
    return [label(c, labels) for c in frame.columns if frame[c].map(lambda v: isinstance(v, (str, bool))).any()]


def label(column: object, labels: Mapping[str, str] | None = None) -> str:
    return (labels or {}).get(str(column), str(column).replace("_", " "))


def text(value: Any, style: str = "") -> str:
    """One value as people read it; the style % makes a share a percentage."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    if isinstance(value, (bool, str)) or type(value).__name__ == "bool":
        return ("yes" if value else "no") if not isinstance(value, str) else value
    if style == "%":
        return f"{100 * value:.1f} %"
    if style:
        return format(value, style)
    return f"{value:,}" if isinstance(value, Integral) else f"{value:.4g}"


def figure(plot: go.Figure, title: str, caption: str, *, alt: str, height: int = 420) -> Markup:
    """Any plotly figure in the page's style. `alt` says in words what it shows."""
    plot.layout.template = None
    lay_out(plot, height)
    return page.figure_block(plot, title, caption, alt=alt)


def interval_figure(
    frame: pd.DataFrame,
    x_title: str,
    *,
    label: str = "arm",
    value: str = "difference",
    low: str = "low",
    high: str = "high",
    reference: float = 0.0,
) -> go.Figure:
    """A dot with its interval per row, one under the other; `reference` is a vertical line: no change."""
    plot = go.Figure(layout_template="none")
    names = [str(name) for name in frame[label]]
    plot.add_scatter(
        x=list(frame[value]),
        y=names,
        mode="markers",
        marker={"size": 10, "color": COLOURS["main"]},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": list((frame[high] - frame[value]).fillna(0)),
            "arrayminus": list((frame[value] - frame[low]).fillna(0)),
            "color": COLOURS["main"],
        },
        hovertemplate="%{y}: %{x:.4g}<extra></extra>",
    )
    plot.add_vline(x=reference, line={"color": COLOURS["reference"], "width": 1.5, "dash": "dash"})
    plot.update_xaxes(title=x_title)
    plot.update_yaxes(autorange="reversed")
    return plot


def curves_figure(frame: pd.DataFrame, *, x: str, y: str, by: str, x_title: str, y_title: str) -> go.Figure:
    """Lines of y over x, one colour per value of `by`, thin ones for seeds (column seed)."""
    plot = go.Figure(layout_template="none")
    for i, name in enumerate(dict.fromkeys(frame[by])):
        rows = frame[frame[by] == name]
        seeds = rows.groupby("seed", sort=False) if "seed" in rows else [(0, rows)]
        for j, (_, line) in enumerate(seeds):
            plot.add_scatter(
                x=list(line[x]),
                y=list(line[y]),
                name=str(name),
                legendgroup=str(name),
                showlegend=j == 0,
                mode="lines+markers" if len(line) < 40 else "lines",
                line={"color": PARTS[i % len(PARTS)], "width": 2},
                marker={"size": 4},
                opacity=0.8,
                hovertemplate=f"{x_title} %{{x:.4g}}: %{{y:.4g}}<extra>{name}</extra>",
            )
    plot.update_xaxes(title=x_title)
    plot.update_yaxes(title=y_title)
    return plot


def write_tables(directory: Path, tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """`tables/NAME.csv` and `.parquet` below `directory`; their relative paths."""
    folder = directory / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, frame in tables.items():
        # A grid's factor may be a number here and a word there ("auto"): such a column is text in the files.
        plain = frame.copy()
        for column in plain.columns:
            if plain[column].map(type).nunique() > 1 and plain[column].dtype == object:
                plain[column] = [None if v is None else v if isinstance(v, str) else json.dumps(v) for v in plain[column]]
        plain.to_csv(folder / f"{name}.csv", index=False)
        plain.to_parquet(folder / f"{name}.parquet", index=False, write_page_checksum=True)
        names += [f"tables/{name}.csv", f"tables/{name}.parquet"]
    return names


def write_study_page(
    path: Path,
    *,
    title: str,
    question: str,
    conclusion: str,
    findings: Sequence[str],
    blocks: Sequence[str],
    cells: Sequence[Mapping[str, Any]],
    tables: Sequence[str],
    setup: Mapping[str, object],
    config_text: str,
    command: str,
    footer: str,
) -> Path:
    """One self-contained HTML file."""
    failed = [cell for cell in cells if cell["status"] == "failed"]
    missing = [cell for cell in cells if cell["status"] == "not run"]
    top = [page.paragraph(question, "question")]
    if failed:
        names = "; ".join(f"{cell['name']}: {cell['reason']}" for cell in failed)
        top.append(page.callout(f"{len(failed)} of {len(cells)} cells failed and have no numbers here.", names))
    if missing:
        reason = missing[0]["reason"]
        top.append(
            page.callout(
                f"{len(missing)} of {len(cells)} cells were not measured ({reason}).", "The same command goes on from there."
            )
        )
    if findings:
        top.append(Markup("<ul class='findings'>{}</ul>").format(page.join(Markup("<li>{}</li>").format(f) for f in findings)))
    links = page.join((Markup('<a href="{}">{}</a>').format(name, name.removeprefix("tables/")) for name in tables), ", ")
    body = [
        *top,
        page.section("What was measured", *blocks),
        page.section("Every cell", cells_table(cells)),
        page.section(
            "How to get this again",
            page.preformatted(command),
            page.facts(setup),
            page.paragraph(Markup("Tables beside this page: {}").format(links)) if tables else "",
            page.collapsible("the base experiment, resolved", page.preformatted(config_text)),
        ),
    ]
    html = page.page(title, conclusion, body, kind="Study", footer=footer)
    return page.write_page(path, html)


def cells_table(cells: Sequence[Mapping[str, Any]]) -> Markup:
    """State, device and duration of every cell; the reason where it has no numbers."""
    words = {"done": "measured", "cached": "measured earlier", "failed": "✗ failed", "not run": "not measured"}
    frame = pd.DataFrame(
        {
            "cell": [cell["name"] for cell in cells],
            "state": [words[cell["status"]] for cell in cells],
            "took": [duration(cell["seconds"]) if cell["status"] != "not run" else MISSING for cell in cells],
            "device": [f"{cell['device']}, {cell['precision']}" if cell.get("device") else MISSING for cell in cells],
            "reason": [cell["reason"] for cell in cells],
        }
    )
    if not any(frame["reason"]):
        frame = frame.drop(columns="reason")
    block = page.html_table(frame, "one arm at one point of the grid with one seed", text_columns=["state", "device", "reason"])
    return (
        page.collapsible(f"{len(cells)} cells", block)
        if len(cells) > 12 and all(cell["status"] in ("done", "cached") for cell in cells)
        else block
    )


def _ranged(row: Mapping[Any, Any], column: str, style: str, between: str) -> str:
    value, low, high = row[column], row[f"{column}_low"], row[f"{column}_high"]
    shown = text(value, style)
    if shown == MISSING or pd.isna(low) or pd.isna(high):
        return shown
    return f"{shown} ({text(low, style)}{between}{text(high, style)})"

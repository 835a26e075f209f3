"""What became slower between two runs of the timing study.

    python -m gptcore.studies.timing.difference RUN_A RUN_B [OUT.html]

Compares every section of every cell that both have, by arm and point of the grid, seeds paired; writes a page (default: RUN_B/difference.html).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from gptcore.config import UserError
from gptcore.config.study import load_study
from gptcore.entry import run_process
from gptcore.report import page
from gptcore.report.study import figure, interval_figure, table
from gptcore.studies import Results
from gptcore.studies.engine import read_cells
from gptcore.studies.statistics import mean_interval

SHOWN = 20


def section_times(directory: Path) -> pd.DataFrame:
    """Columns arm, point, section, seed, ms: of the map and of the steps; point is the grid's, "" without one.

    Raises UserError for what is no run of the timing study.
    """
    if not (directory / "study.yaml").is_file():
        raise UserError(f"{directory}: not a study's run (no study.yaml in it); give two folders of runs/")
    plan = load_study(directory / "study.yaml")
    if plan.name != "timing":
        raise UserError(f"{directory}: a run of the {plan.name} study; give two runs of the timing study")
    results = Results(plan, read_cells(directory, plan), directory)
    rows, steps = results.table(), results.table("sections")
    frames = []
    if len(rows) and (rows["kind"] == "pipeline").any():
        own = rows[rows["kind"] == "pipeline"]
        frames.append(own.assign(ms=1e3 * own["seconds"].astype(float)))
    if len(steps):
        frames.append(steps)
    if not frames:
        raise UserError(f"{directory}: has no finished cell; run the study again")
    times = pd.concat([frame[["cell", "arm", "section", "seed", "ms"]] for frame in frames], ignore_index=True)
    points = {
        cell["name"]: ", ".join(f"{key}={value}" for key, value in sorted(cell["factors"].items())) for cell in results.cells
    }
    return times.assign(point=times["cell"].map(points)).drop(columns="cell")


def compare(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Columns arm, point, section, before, after, change, low, high (ms, B − A), n: largest change first."""
    keys = ["arm", "point", "section"]
    both = a.merge(b, on=[*keys, "seed"], suffixes=("_a", "_b"))
    rows = []
    for (arm, point, section), own in both.groupby(keys, sort=False):
        change = mean_interval(own["ms_b"] - own["ms_a"])
        means = float(own["ms_a"].mean()), float(own["ms_b"].mean())
        rows.append((arm, point, section, *means, change.mean, change.low, change.high, change.n))
    frame = pd.DataFrame(rows, columns=[*keys, "before", "after", "change", "low", "high", "n"])
    return frame.reindex(frame["change"].abs().sort_values(ascending=False).index).reset_index(drop=True)


def place(row: pd.Series) -> str:
    """The arm and, with a grid, its point."""
    return f"{row['arm']}, {row['point']}" if row["point"] else str(row["arm"])


def conclude(frame: pd.DataFrame, a: str, b: str) -> str:
    """What became slower most, where the interval says that it did."""
    if frame.empty:
        return f"{a} and {b} have no cell in common."
    sure = frame[(frame["n"] > 1) & (frame["low"] > 0)]
    if sure.empty:
        return f"Nothing became slower from {a} to {b} beyond its 95 % interval ({len(frame)} sections compared)."
    worst = sure.sort_values("change", ascending=False).iloc[0]
    return (
        f"From {a} to {b}, {worst['section']} of {place(worst)} became slower most: {worst['before']:.2f} to {worst['after']:.2f} ms "
        f"(+{worst['change']:.2f} ms, n={worst['n']}, 95 % interval {worst['low']:.2f} to {worst['high']:.2f})."
    )


def main(argv: list[str]) -> dict[str, Any]:
    if len(argv) not in (2, 3) or argv[0].startswith("-"):
        raise UserError("usage: python -m gptcore.studies.timing.difference RUN_A RUN_B [OUT.html]")
    first, second = Path(argv[0]), Path(argv[1])
    frame = compare(section_times(first), section_times(second))
    conclusion = conclude(frame, first.name, second.name)
    top = frame.head(SHOWN)
    shown = top.assign(what=[f"{place(row)}: {row['section']}" for _, row in top.iterrows()])
    listed = frame if frame["point"].any() else frame.drop(columns="point")
    blocks = []
    if len(frame):
        plot = interval_figure(shown, "ms slower (right) or faster (left)", label="what", value="change")
        caption, alt = "Seeds paired, 95 % intervals.", "Change of each section in ms"
        styles = dict.fromkeys(("before", "after", "change", "low", "high"), ".3f")
        blocks = [
            figure(plot, "The largest changes", caption, alt=alt, height=120 + 30 * len(top)),
            table("Sections", listed, "milliseconds, B minus A", styles=styles),
        ]
    out = Path(argv[2]) if len(argv) == 3 else second / "difference.html"
    page.write_page(out, page.page(f"{first.name} → {second.name}", conclusion, blocks, kind="Difference"))
    return {"report": str(out.resolve()), "conclusion": conclusion, "sections": len(frame)}


if __name__ == "__main__":
    raise SystemExit(run_process(main))

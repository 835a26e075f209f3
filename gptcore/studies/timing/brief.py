"""What `gptloom run` shows of the timing study: the sections of its own training step."""

from __future__ import annotations

from gptcore.studies import Brief, Results
from gptcore.studies.timing.step import REST


def brief(results: Results) -> Brief:
    """Rows of section and mean milliseconds (means add up; medians would not), largest first."""
    cell = results.cells[0]
    facts, sections = cell["rows"][0], cell["tables"]["sections"]
    n, wall = facts["repeats"], sum(row["ms"] for row in sections)
    rows = [
        {
            "section": "other" if row["section"] == REST else row["section"].replace(" / ", ": "),
            "ms": row["ms"],
            "share": row["share"],
            "low": row["ms_min"],
            "high": row["ms_max"],
            "n": n,
        }
        for row in sections
    ]
    top = rows[0]
    conclusion = (
        f"A step takes {facts['step_ms']:.0f} ms undisturbed and {wall:.0f} ms with the clock in it; "
        f"{top['section']} is the largest part with {100 * top['share']:.0f} % "
        f"({top['low']:.0f} to {top['high']:.0f} ms, n={n})."
    )
    metrics = {f"timing/{row['section'].replace(': ', '_')}_ms": row["ms"] for row in rows}
    step = {"step_ms": facts["step_ms"], "step_ms_low": facts["step_ms_min"], "step_ms_high": facts["step_ms_max"]}
    return Brief(
        "Inside a training step",
        rows,
        conclusion,
        metrics | {"timing/step_ms": facts["step_ms"]},
        f"a whole step takes {wall:,.1f} ms; mean (fastest–slowest)",
        {"wall_ms": wall, **step, "n": n},
    )

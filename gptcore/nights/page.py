"""The report of a night as one self-contained HTML file: what happened, why, and the ledger."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from gptcore.nights.gate import Decision
from gptcore.nights.ledger import Matrix, matrix_figure
from gptcore.report import page, write_page

GOOD = ("promoted", "kept", "skipped")
NAMES = {"val_bpb": "bits per byte"}  # as people call the ledger's fields


def write_night(
    path: Path,
    night: dict[str, Any],
    nights: list[dict[str, Any]],
    arms: dict[str, dict[str, Any]],
    decision: Decision | None,
    matrix: Matrix | None,
    sentences: list[str],
) -> Path:
    """Write the page of `night` (a record of the ledger) to `path`; whatever the night did not get to is left out."""
    lead = f"Night {night['night']}, {night['outcome']}: {night['reason'].partition(':')[0]}"
    shown = {key: value for key, value in night.items() if key not in ("outcome", "reason") and value is not None}
    facts = page.facts({NAMES.get(key, key): value for key, value in shown.items()})
    verdict = page.callout(night["outcome"], night["reason"], "good" if night["outcome"] in GOOD else "bad")
    blocks = [page.section("Tonight", verdict, facts)]
    if arms:
        blocks.append(page.section("Arms", _arms_table(arms), intro="Each arm saw the same number of tokens."))
    if decision is not None and decision.comparison is not None:
        blocks.append(page.section("Gate", _gate_table(decision), intro=str(decision.comparison)))
    if matrix is not None:
        picture = page.figure_block(
            matrix_figure(matrix),
            "Every model on every night's held-out text",
            "A row that rises to the right is data drift; a column that rises downwards is a regression.",
            alt="A matrix of bits per byte, models by hold-outs",
        )
        blocks.append(page.section("Drift ledger", *[page.paragraph(text) for text in sentences], picture))
    blocks.append(page.section("Nights so far", _nights_table(nights)))
    footer = f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by gptloom."
    return write_page(path, page.page(night["run"], lead, blocks, kind="Nightly report", footer=footer))


def _arms_table(arms: dict[str, dict[str, Any]]) -> str:
    rows = [
        {
            "arm": key,
            "tokens": f"{arm['tokens_seen']:,}",
            "bits per byte, own validation text": f"{arm['val_bpb']:.4f}",
            "bits per byte, frozen hold-outs": f"{arm['frozen_bpb']:.4f}" if arm.get("frozen_bpb") else "–",
            "recited, training text": f"{100 * arm['recited'][0]:.1f} %",
            "recited, held-out text": f"{100 * arm['recited'][1]:.1f} %",
            "seconds": f"{arm['seconds']:.1f}",
        }
        for key, arm in arms.items()
    ]
    return page.html_table(pd.DataFrame(rows), "Tonight's arms")


def _gate_table(decision: Decision) -> str:
    rows = [
        {
            "part": name,
            "champion": f"{c.champion_bpb:.4f}",
            "challenger": f"{c.challenger_bpb:.4f}",
            "change": f"{c.percent:+.2f} %",
            "interval": f"{c.low:+.4f} to {c.high:+.4f}" if c.low is not None else "–",
            "resampled": f"{c.clusters} {c.unit}",
        }
        for name, c in {"all frozen hold-outs": decision.comparison, **decision.groups}.items()
        if c is not None
    ]
    return page.html_table(pd.DataFrame(rows), "Champion and challenger on the same text, bits per byte")


def _nights_table(nights: list[dict[str, Any]]) -> str:
    keys = ("night", "outcome", "champion", "val_bpb", "reason")
    rows = [{key: "–" if night.get(key) is None else str(night[key]) for key in keys} for night in nights]
    for row, night in zip(rows, nights, strict=True):
        row["val_bpb"] = "–" if night["val_bpb"] is None else f"{night['val_bpb']:.4f}"
    return page.html_table(pd.DataFrame(rows).rename(columns=NAMES), "Outcomes", text_columns=("outcome", "reason", "champion"))

"""From the cells of a study run to its tables, its report and its one sentence.

python -m gptcore.studies.finish RUN_DIR        # writes the report of a run that is on disk again
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from gptcore.config import UserError, dump_yaml
from gptcore.config.study import StudyPlan, load_study
from gptcore.entry import run_process
from gptcore.report.study import write_study_page, write_tables
from gptcore.store import write_json
from gptcore.studies import DONE, Results, Summary
from gptcore.studies.engine import find, read_cells

log = logging.getLogger(__name__)


def finish(directory: Path, *, command: str = "", seconds: float | None = None) -> dict[str, Any]:
    """Write tables/, report.html and result.json of the run in `directory`; the result: run, report, cells, failed, conclusion, …

    Raises UserError for a directory without study.yaml.
    """
    if not (directory / "study.yaml").is_file():
        raise UserError(f"{directory}: not a study's run (no study.yaml in it); give a folder of runs/")
    plan = load_study(directory / "study.yaml")
    results = Results(plan, read_cells(directory, plan), directory)
    study = find(plan.name)
    counts = {state: sum(cell["status"] == state for cell in results.cells) for state in (*DONE, "failed", "not run")}
    summary = _summarize(results)
    tables = {"results": results.table(), **summary.tables, "cells": _cell_frame(results)}
    names = write_tables(directory, {name: frame for name, frame in tables.items() if len(frame)})
    devices = sorted({f"{cell['device']}, {cell['precision']}" for cell in results.cells if cell.get("device")})
    report = write_study_page(
        directory / "report.html",
        title=study.title,
        question=plan.config.question,
        conclusion=summary.conclusion,
        findings=summary.findings,
        blocks=summary.blocks,
        cells=results.cells,
        tables=names,
        setup={
            "device": "; ".join(devices) or "–",
            "torch": torch.__version__,
            "seeds": ", ".join(map(str, plan.config.seeds)),
            "arms": ", ".join(arm.name for arm in plan.config.arms),
            **{key: ", ".join(map(str, values)) for key, values in plan.config.grid.items()},
        },
        config_text=dump_yaml(plan.base),
        command=command or f"gptloom study {plan.name}",
        footer=f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by gptloom from {directory.name}. "
        "The file is complete in itself and asks no network for anything.",
    )
    result = {
        "run": directory.name,
        "study": plan.name,
        "report": str(report.resolve()),
        "cells": len(results.cells),
        "measured": counts["done"],
        "cached": counts["cached"],
        "failed": counts["failed"],
        "not_run": counts["not run"],
        "conclusion": summary.conclusion,
        "findings": list(summary.findings),
        "tables": names,
        "metrics": summary.metrics,
        "seconds": seconds,
    }
    write_json(directory / "result.json", result)
    (directory / "log_entry.md").write_text(log_entry(plan, result, devices, command), encoding="utf-8")
    return result


def log_entry(plan: StudyPlan, result: dict[str, Any], devices: list[str], command: str) -> str:
    """What experiments/LOG.md should say of this run, ready to be put there when the result is committed."""
    lines = [
        f"## {datetime.now(UTC):%Y-%m-%d} · {find(plan.name).title}",
        "",
        f"{plan.config.question} `{command or 'gptloom study ' + plan.name}`, {'; '.join(devices) or 'no device'}, "
        f"{result['cells']} cells, {result['failed']} failed, {result['not_run']} not measured.",
        "",
        result["conclusion"],
        *(f"- {finding}" for finding in result["findings"]),
    ]
    return "\n".join(lines) + "\n"


def _summarize(results: Results) -> Summary:
    if not any(cell["status"] in DONE for cell in results.cells):
        failed = [cell for cell in results.cells if cell["status"] == "failed"]
        reason = f": {failed[0]['name']} failed ({failed[0]['reason']})" if failed else "; the time was over before the first"
        return Summary(f"Nothing was measured{reason}.")
    return find(results.plan.name).summarize(results)


def _cell_frame(results: Results) -> pd.DataFrame:
    keys = ("name", "arm", "seed", "status", "reason", "seconds", "device", "precision", "key")
    return pd.DataFrame([{key: cell.get(key) for key in keys} for cell in results.cells])


def main(argv: list[str]) -> dict[str, Any]:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("usage: python -m gptcore.studies.finish RUN_DIR (a folder of $GPTLOOM_HOME/runs)")
    return finish(Path(argv[0]))


if __name__ == "__main__":
    raise SystemExit(run_process(main))

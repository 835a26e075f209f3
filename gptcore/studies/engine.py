"""Run a study's cells one after the other in one device process, each with a folder and a journal of its own.

A finished cell is committed to `home/studies/cells/<key>`; the key is the sha256 of all that its numbers depend on, so a second
call, a resumed one, or a study that shares cells with another measures only what is new. A cell that fails leaves its reason
and the others go on.
"""

from __future__ import annotations

import gc
import importlib
import logging
import shutil
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from gptcore import NUMERICS_VERSION
from gptcore.config import UserError, flatten
from gptcore.config.study import StudyPlan
from gptcore.device import Device, choose_device, reserve_device
from gptcore.entry import StopFlag
from gptcore.errors import Stopped, describe_error, exit_code
from gptcore.journal import FILE_NAME, Journal, read_journal
from gptcore.shards import ShardSet
from gptcore.store import (
    commit_dir,
    content_id,
    home_dir,
    is_committed,
    link_or_copy,
    make_home,
    read_json,
    verified,
    write_json,
)
from gptcore.studies import CELL_FILE, DONE, Bench, Cell, Study
from gptcore.studies.training import Trained
from gptcore.timing import format_seconds

log = logging.getLogger(__name__)

STOP_FILE = "stop"
KEPT_TAG = "gptloom.cached"


class Deadline:
    """True once a signal or a file asks to stop, or the study's minutes are over. `is_asked` tells which.

    The file is for studies on several devices, whose processes are watched from threads that no signal reaches.
    """

    def __init__(self, flag: StopFlag, minutes: float, stop_file: Path) -> None:
        self._flag, self._end, self._stop_file = flag, time.monotonic() + 60 * minutes, stop_file

    @property
    def is_asked(self) -> bool:
        return bool(self._flag) or self._stop_file.exists()

    def __bool__(self) -> bool:
        return self.is_asked or time.monotonic() >= self._end

    def interrupting(self) -> AbstractContextManager[None]:
        """As StopFlag's: a signal raises Stopped at once. The minutes do not, they end between two steps."""
        return self._flag.interrupting()


def find(name: str) -> Study:
    """The study of that name."""
    study = getattr(importlib.import_module(f"gptcore.studies.{name}"), "STUDY", None)
    assert isinstance(study, Study), f"gptcore.studies.{name} has no STUDY"
    return study


def check_options(plan: StudyPlan) -> StudyPlan:
    """The plan with every cell's options as the study's own class. Raises UserError naming arm and option."""
    study = find(plan.name)
    cells = []
    for cell in plan.cells:
        try:
            cells.append(replace(cell, options=study.options.model_validate(cell.options)))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                reason = f"unknown; known options: {', '.join(study.options.model_fields)}"
            else:
                reason = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
            raise UserError(f"arm {cell.arm}: options.{where}={first['input']!r}: {reason}") from None
    return replace(plan, cells=tuple(cells))


def cell_key(plan: StudyPlan, cell: Cell, shards: ShardSet, device: Device) -> str:
    """16 hex digits of everything that a cell's numbers depend on; where the text lay and what the experiment is called do not count."""
    config = cell.config.model_dump(mode="json", exclude={"name", "data", "vocab", "studies"})
    options = cell.options.model_dump(mode="json")
    return content_id(
        {
            "study": plan.name,
            "version": find(plan.name).version,
            "config": config,
            "options": options,
            "shards": shards.id,
            "numerics": NUMERICS_VERSION,
            "torch": torch.__version__,
            "device": device.name,
            "precision": device.precision,
        }
    )


def run_cells(
    plan: StudyPlan,
    shards: ShardSet,
    out: Path,
    run: str,
    parent: str | None,
    *,
    part: int = 0,
    parts: int = 1,
    own: Trained | None = None,
) -> list[dict[str, Any]]:
    """Measure every `parts`-th cell from `part` on, each in `out/<cell>`; the contents of their `cell.json`.

    own: measure this training instead of those that the cells' configs ask for. Raises Stopped after a signal, with what is
    finished kept.
    """
    plan = check_options(plan)
    flag = StopFlag()
    flag.install()
    stop = Deadline(flag, plan.config.minutes, out.parent / STOP_FILE)
    mine = plan.cells[part::parts]
    records: list[dict[str, Any]] = []
    for number, cell in enumerate(mine, 1):
        record = run_cell(plan, cell, shards, out / cell.name, f"{run}/{cell.name}", parent, stop, own)
        records.append(record)
        left = describe_left([cell.arm for cell in mine[number:]], records)
        log.info("cell %d/%d %s: %s%s", number, len(mine), cell.name, _outcome(record), left)
        if stop.is_asked:
            raise Stopped(f"stopped after {number} of {len(mine)} cells; the same command goes on from there")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return records


def count_parts(plan: StudyPlan) -> int:
    """Processes that share a study's cells: one a GPU where all cells may use one, else one, for they would disturb each other."""
    if any(cell.config.train.device == "cpu" for cell in plan.cells):
        return 1
    return max(1, min(torch.cuda.device_count(), len(plan.cells)))


def describe_left(arms: Sequence[str], records: Sequence[dict[str, Any]]) -> str:
    """How long the cells still to come may take (`arms`: one name each), for the end of a line; empty where nothing is known.

    A cell takes what the finished ones of its arm took on average, when they were measured; cells of arms that none is finished of
    are counted, not guessed: arms differ by a hundred times.
    """
    took: dict[str, list[float]] = {}
    for record in records:
        if record["status"] in DONE:
            took.setdefault(record["arm"], []).append(record["seconds"])
    seconds = sum(statistics.mean(took[arm]) for arm in arms if arm in took)
    unknown = sum(arm not in took for arm in arms)
    parts = [f"about {format_seconds(seconds)} left"] if seconds else []
    if unknown:
        parts.append(f"{unknown} cell{'s' if unknown > 1 else ''} of arms not measured yet")
    return f", {' and '.join(parts)}" if parts else ""


def run_cell(
    plan: StudyPlan,
    cell: Cell,
    shards: ShardSet,
    out: Path,
    run: str,
    parent: str | None,
    stop: Deadline,
    own: Trained | None = None,
) -> dict[str, Any]:
    """Measure one cell, or take what is kept of it; returns and writes `out/cell.json`. Never raises for what the cell did."""
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"name": cell.name, "arm": cell.arm, "factors": cell.factors, "seed": cell.seed}
    record |= {"status": "failed", "reason": "", "seconds": 0.0, "rows": [], "tables": {}, "metrics": {}, "files": []}
    journal = Journal(out)
    journal.open(run, parent, title=cell.name)
    start = time.perf_counter()
    status = "FAILED"
    try:
        device = choose_device(cell.config.train.device, cell.config.train.precision)
        key = cell_key(plan, cell, shards, device)
        record |= {"device": device.name, "precision": device.precision, "key": key}
        journal.tags({**device.tags(), "gptloom.study": plan.name, "gptloom.arm": cell.arm, "gptloom.seed": str(cell.seed)})
        journal.params(flatten(cell.config) | flatten(cell.options, "options.") | {"study": plan.name, "arm": cell.arm})
        kept = make_home() / "studies" / "cells" / key
        if own is None and is_committed(kept):  # a key knows nothing of weights that another process trained
            record |= _take(kept, out, journal, record)
        elif stop:
            record["status"], record["reason"], status = "not run", "the study's time was over", "KILLED"
        else:
            with reserve_device(device), device.attention(cell.config.model.dropout):
                torch.manual_seed(cell.seed)
                result = find(plan.name).measure(cell, Bench(shards, device, out, journal, stop, home_dir(), own))
            record |= {"status": "done", "rows": result.rows, "tables": result.tables, "metrics": result.metrics}
            record |= {"files": list(result.files), "seconds": time.perf_counter() - start}
            journal.metrics(result.metrics | {"study/seconds": record["seconds"]}, tokens_seen=0)
            for file in result.files:
                journal.artifact(file)
            if own is None:
                _keep(kept, out, record)
        if record["status"] in DONE:
            status = "FINISHED"
    except Stopped as error:
        record["status"], record["reason"], status = "not run", f"{describe_error(error)}", "KILLED"
    except Exception as error:
        log.error("cell %s failed", cell.name, exc_info=not isinstance(error, UserError))
        record |= {"status": "failed", "reason": describe_error(error), "code": exit_code(error)}
        record |= {"rows": [], "tables": {}, "metrics": {}}
    record["seconds"] = record["seconds"] or time.perf_counter() - start
    write_json(out / CELL_FILE, record)
    journal.close(status, record["reason"])
    return record


def read_cells(directory: Path, plan: StudyPlan) -> list[dict[str, Any]]:
    """The `cell.json` of every cell of a run, in the plan's order; cells that were never reached say so."""
    found = {}
    for path in sorted(directory.glob(f"cells/*/*/{CELL_FILE}"), key=_age):
        try:
            record = read_json(path)
            found[record["name"]] = record
        except (UserError, LookupError) as error:
            log.warning("a cell counts as not run (%s)", error)
    missing = {"status": "not run", "reason": "the study ended before it", "seconds": 0.0, "rows": [], "tables": {}}
    return [
        found.get(
            cell.name,
            {"name": cell.name, "arm": cell.arm, "factors": cell.factors, "seed": cell.seed, "metrics": {}, **missing},
        )
        for cell in plan.cells
    ]


def _age(path: Path) -> int:
    """When it was written: a run that went on with another number of GPUs has a cell in two folders, and the newer counts."""
    return path.stat().st_mtime_ns


def _outcome(record: dict[str, Any]) -> str:
    if record["status"] == "done":
        return f"done in {format_seconds(record['seconds'])}"
    return f"{record['status']}" + (f" ({record['reason']})" if record["reason"] else "")


def _keep(kept: Path, out: Path, record: dict[str, Any]) -> None:
    """Commit a finished cell: its numbers, its journal as it is now, its files."""
    with commit_dir(kept, {"kind": "cell", "id": kept.name}) as tmp:
        write_json(tmp / CELL_FILE, record)
        for name in (FILE_NAME, *record["files"]):
            (tmp / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(out / name, tmp / name)


def _take(kept: Path, out: Path, journal: Journal, record: dict[str, Any]) -> dict[str, Any]:
    """A kept cell's numbers and files; its curves are told again to this run's journal, so that runs compare in MLflow."""
    verified(kept)
    old: dict[str, Any] = read_json(kept / CELL_FILE)
    for line in read_journal(kept / FILE_NAME)[0]:
        if line["kind"] == "metrics":
            journal.metrics(line["values"], tokens_seen=line["tokens_seen"], step=line["step"])
    journal.tags({KEPT_TAG: kept.name})
    for file in old["files"]:
        link_or_copy(kept / file, out / file)
        journal.artifact(file)
    names = ("name", "arm", "factors", "seed")  # another study may call the same cell otherwise
    return {**old, **{key: record[key] for key in names}, "status": "cached"}

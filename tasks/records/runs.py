"""Runs by name, and what MLflow missed of them: `gptloom sync`.

from gptloom.tasks.records.runs import run_named, sync
sync(["shakespeare-20261124-103000-1a2b"])
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptcore.config import UserError, load_written
from gptcore.errors import first_line
from gptcore.journal import FILE_NAME, read_journal
from gptcore.store import home_dir, is_claimed
from gptloom.tasks.records.forwarding import forward_tree
from gptloom.tasks.records.tracking import RUN_TAG, connect, tracking_uri

log = logging.getLogger("gptloom.tracking")

SETTINGS = "config.yaml"  # of a run: the first thing that is written of it


def is_run(directory: Path) -> bool:
    """Is there anything of a run that one can go on with, or show?"""
    return (directory / FILE_NAME).is_file() or (directory / SETTINGS).is_file()


def experiment_of(directory: Path) -> str:
    """The MLflow experiment of a run: what its journal says, else its settings, else what its name begins with."""
    for record in read_journal(directory / FILE_NAME)[0]:
        if record["kind"] == "params" and isinstance(record["values"].get("name"), str):
            return str(record["values"]["name"])
    try:
        return load_written(directory / SETTINGS).name
    except UserError as error:
        name = directory.name.rsplit("-", 3)[0]
        log.warning("run %s: taken for one of the experiment %s, by its name (%s)", directory.name, name, error)
        return name


def run_named(text: str) -> str:
    """The name of a pipeline run, from its name, that of one of its steps (`RUN/train`) or an MLflow run id. Raises UserError."""
    runs = home_dir() / "runs"
    name = text.partition("/")[0]
    if name and is_run(runs / name):
        return name
    if name and (runs / name).is_dir():
        raise UserError(f"run {name}: it was stopped before anything was begun; start it anew")
    if re.fullmatch("[0-9a-f]{32}", text):
        try:
            tag = connect(tracking_uri()).get_run(text).data.tags.get(RUN_TAG, "")
        except Exception as error:
            raise UserError(f"run {text}: MLflow does not know it ({first_line(error)})") from None
        if tag and is_run(runs / tag.partition("/")[0]):
            return tag.partition("/")[0]
    newest = sorted(runs.glob(f"*/{FILE_NAME}"), key=lambda path: path.stat().st_mtime)[-3:]
    there = f"the newest are {', '.join(path.parent.name for path in reversed(newest))}" if newest else "it has none"
    raise UserError(f"run {text}: {runs} has no such run; {there}")


def sync(names: Sequence[str] = ()) -> dict[str, Any]:
    """Replay the journals of these runs (none named: of all) to MLflow: {"runs": replayed, "missing": still incomplete there}.

    A run that is at work forwards its own records and is left out. Raises UserError for a name that no run has.
    """
    runs = home_dir() / "runs"
    found = [run_named(name) for name in names] or sorted(path.parent.name for path in runs.glob(f"*/{FILE_NAME}"))
    missing: list[str] = []
    replayed: list[str] = []
    for name in found:
        if is_claimed(runs / name):
            log.warning("%s is at work and forwards its own records", name)
            continue
        (missing if forward_tree(runs / name, experiment_of(runs / name)) else replayed).append(name)
    return {"runs": replayed, "missing": missing}

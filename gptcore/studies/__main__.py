"""A study, or one device's share of its cells, as a process.

python -m gptcore.studies timing [--smoke] [section.field=value …]             # all of it, without Prefect and MLflow, on all GPUs here
python -m gptcore.studies RUN/study.yaml --shards DIR --out DIR --part 0/2     # what `gptloom study` starts, once per device
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from gptcore.config import UserError, with_changes
from gptcore.config.study import StudyPlan, find_study, load_study, write_plan
from gptcore.config.switches import STUDIES
from gptcore.entry import PARENT_VARIABLE, process_parser, python_environment, run_process
from gptcore.errors import EXIT_STOPPED, Stopped
from gptcore.shards import ShardSet, prepare
from gptcore.store import make_home
from gptcore.studies.engine import check_options, count_parts, run_cells
from gptcore.studies.finish import finish


def main(argv: list[str]) -> dict[str, Any]:
    parser = process_parser(__doc__, "study", f"{', '.join(STUDIES)}, or a study file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to study and experiment")
    parser.add_argument("--smoke", action="store_true", help="the smallest form, to see that everything works")
    parser.add_argument("--part", default="", metavar="I/N", help="only every N-th cell from I on, on GPU I")
    args = parser.parse_intermixed_args(argv)
    plan = load_study(find_study(str(args.study)), args.overrides, smoke=args.smoke)
    if args.part:
        return run_part(plan, args.part, args.shards, args.out, args.run, args.parent)
    check_options(plan)
    start = time.monotonic()
    out: Path = args.out or make_home() / "runs" / f"{plan.name}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    study = write_plan(plan, out)
    shards = args.shards or prepare(longest(plan), make_home()).shards
    run, parts = args.run or out.name, count_parts(plan)
    if parts == 1:
        run_cells(plan, ShardSet.open(shards), out / "cells" / "0", run, args.parent)
    else:
        run_parts(study, shards, out / "cells", run, parts)
    command = " ".join(["python -m gptcore.studies", *argv])
    return finish(out, command=command, seconds=time.monotonic() - start)


def longest(plan: StudyPlan) -> Any:
    """The base experiment with the longest context of all cells: the text must hold it."""
    return with_changes(plan.base, model={"block_size": plan.block_size})


def run_parts(study: Path, shards: Path, out: Path, run: str, parts: int) -> None:
    """All cells, each part in a process with a GPU of its own. Raises Stopped after a signal, RuntimeError when one failed."""
    command = [sys.executable, "-m", "gptcore.studies", str(study), "--shards", str(shards), "--run", run]
    environment = python_environment() | {PARENT_VARIABLE: str(os.getpid())}  # they end with us
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // parts)))
    processes = [
        subprocess.Popen(
            [*command, "--out", str(out / str(part)), "--part", f"{part}/{parts}"],
            env=environment,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C comes through us: a second one would end them without a checkpoint
        )
        for part in range(parts)
    ]

    def pass_on(number: int, _frame: object) -> None:
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    codes = [process.wait() for process in processes]
    if EXIT_STOPPED in codes:
        raise Stopped("stopped; the same command goes on from there")
    if any(codes):
        raise RuntimeError(f"exit codes {codes} of the {parts} parts: see their words above")


def run_part(
    plan: StudyPlan, part: str, shards: Path | None, out: Path | None, run: str | None, parent: str | None
) -> dict[str, Any]:
    """The cells of one device, each nested in the run `parent`. Raises UserError for arguments that do not fit."""
    numbers = part.split("/")
    if len(numbers) != 2 or not all(n.isdigit() for n in numbers) or not 0 <= int(numbers[0]) < int(numbers[1]):
        raise UserError(f"--part={part}: expected I/N with 0 <= I < N, e.g. 0/1")
    if shards is None or out is None:
        raise UserError("--part needs --shards DIR and --out DIR; `gptloom study` gives both")
    index, count = map(int, numbers)
    if count > 1 and torch.cuda.is_available():
        if index >= torch.cuda.device_count():
            raise UserError(f"--part={part}: this machine has {torch.cuda.device_count()} GPU(s)")
        torch.cuda.set_device(index)
    logging.getLogger(__name__).info("part %s of study %s", part, plan.name)
    records = run_cells(plan, ShardSet.open(shards), out, run or out.name, parent, part=index, parts=count)
    return {"cells": len(records), "failed": sum(record["status"] == "failed" for record in records)}


if __name__ == "__main__":
    raise SystemExit(run_process(main))

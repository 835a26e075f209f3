"""A study, or one device's share of its cells, as a process.

python -m gptcore.studies timing [--smoke] [section.field=value …]             # all of it, without Prefect and MLflow
python -m gptcore.studies RUN/study.yaml --shards DIR --out DIR --part 0/2     # what `gptloom study` starts, once per device
"""

from __future__ import annotations

import logging
import secrets
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from gptcore.config import UserError, with_changes
from gptcore.config.study import StudyPlan, find_study, load_study, write_plan
from gptcore.entry import process_parser, run_process
from gptcore.shards import ShardSet, prepare
from gptcore.store import home_dir
from gptcore.studies.engine import check_options, run_cells
from gptcore.studies.finish import finish


def main(argv: list[str]) -> dict[str, Any]:
    parser = process_parser(__doc__, "study", "name of a study, or a study file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to study and experiment")
    parser.add_argument("--smoke", action="store_true", help="the smallest form, to see that everything works")
    parser.add_argument("--part", default="", metavar="I/N", help="only every N-th cell from I on, on GPU I")
    args = parser.parse_intermixed_args(argv)
    plan = load_study(find_study(str(args.study)), args.overrides, smoke=args.smoke)
    if args.part:
        return run_part(plan, args.part, args.shards, args.out, args.run, args.parent)
    check_options(plan)
    start = time.monotonic()
    out: Path = args.out or home_dir() / "runs" / f"{plan.name}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    write_plan(plan, out)
    shards = ShardSet.open(args.shards or prepare(longest(plan), home_dir()).shards)
    run_cells(plan, shards, out / "cells" / "0", args.run or out.name, args.parent)
    command = " ".join(["python -m gptcore.studies", *argv])
    return finish(out, command=command, seconds=time.monotonic() - start)


def longest(plan: StudyPlan) -> Any:
    """The base experiment with the longest context of all cells: the text must hold it."""
    return with_changes(plan.base, model={"block_size": plan.block_size})


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
    if count > 1:
        if index >= torch.cuda.device_count():
            raise UserError(f"--part={part}: this machine has {torch.cuda.device_count()} GPU(s)")
        torch.cuda.set_device(index)
    logging.getLogger(__name__).info("part %s of study %s", part, plan.name)
    records = run_cells(plan, ShardSet.open(shards), out, run or out.name, parent, part=index, parts=count)
    return {"cells": len(records), "failed": sum(record["status"] == "failed" for record in records)}


if __name__ == "__main__":
    raise SystemExit(run_process(main))

"""Short forms of studies inside `gptloom run`: small cell sets on the model that the run trained, one after the other in one process.

python -m gptcore.studies.short RUN/config.yaml timing … --shards DIR --checkpoint DIR --out RUN --run NAME

Each has a folder and a journal below --out, nested in the run. One that fails says why there, and the others go on.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from gptcore.config import ExperimentConfig, UserError, load_config
from gptcore.config.study import load_short
from gptcore.config.switches import SHORT
from gptcore.device import choose_device
from gptcore.entry import process_parser, recording, run_process
from gptcore.errors import EXIT_BUG, Stopped, describe_error, error_of, exit_code
from gptcore.shards import ShardSet
from gptcore.store import link_or_copy, read_json, write_json
from gptcore.studies import DONE, Results
from gptcore.studies.engine import find, run_cells
from gptcore.studies.training import RESULT, Trained

log = logging.getLogger(__name__)


def main(argv: list[str]) -> dict[str, Any]:
    parser = process_parser(__doc__, "config", "experiment file (YAML)")
    parser.add_argument("studies", nargs="+", choices=SHORT, metavar="STUDY", help=", ".join(SHORT))
    parser.add_argument("--checkpoint", type=Path, help="trained model: a step_NNNNNN directory")
    args = parser.parse_args(argv)
    if args.shards is None or args.out is None or args.checkpoint is None:
        raise UserError("short forms need --shards DIR, --out DIR and --checkpoint DIR; `gptloom run` gives all three")
    config, shards, run = load_config(args.config), ShardSet.open(args.shards), args.run or args.out.name
    training = args.checkpoint.parents[1]
    own = Trained(training, args.checkpoint, read_json(training / RESULT))
    failed: dict[str, dict[str, Any]] = {}
    for name in args.studies:
        try:
            measure(name, config, shards, own, args.out / name, run)
        except Stopped:
            raise
        except Exception as error:
            log.error("the study %s failed", name, exc_info=not isinstance(error, UserError))
            failed[name] = {"error": describe_error(error), "code": exit_code(error)}
    return {"studies": args.studies, "failed": failed}


def measure(name: str, config: ExperimentConfig, shards: ShardSet, own: Trained, out: Path, run: str) -> dict[str, Any]:
    """All cells of one study, then `out/result.json`: rows, conclusion, seconds, …; the cells' files stand in `out`, too.

    Raises the kind of error that a cell failed with, and its reason.
    """
    start = time.perf_counter()
    study, plan = find(name), load_short(name, config)
    assert study.brief is not None, f"gptcore.studies.{name} has a {name}/brief.py, but no STUDY with it"
    with recording(out, f"{run}/{name}", run) as journal:
        journal.tags(choose_device(config.train.device, config.train.precision).tags())
        journal.params({"study": name, "checkpoint": str(own.checkpoint), "repeats": config.studies.repeats})
        records = run_cells(plan, shards, out / "cells" / "0", f"{run}/{name}", f"{run}/{name}", own=own)
        for record in records:
            if record["status"] not in DONE:
                raise error_of(record.get("code", EXIT_BUG))(f"{record['name']}: {record['reason']}")
        brief = study.brief(Results(plan, records, out))
        result: dict[str, Any] = {
            "study": name,
            "title": brief.title,
            "rows": brief.rows,
            "caption": brief.caption,
            "conclusion": brief.conclusion,
            **brief.facts,
            "seconds": time.perf_counter() - start,
        }
        journal.metrics(brief.metrics | {"study/seconds": result["seconds"]}, tokens_seen=0)
        write_json(out / f"{name}.json", result, has_checksum=False)
        write_json(out / RESULT, result)
        journal.artifact(f"{name}.json")
        for record in records:
            for file in record["files"]:
                link_or_copy(out / "cells" / "0" / record["name"] / file, out / file)
                journal.artifact(file)
    return result


if __name__ == "__main__":
    raise SystemExit(run_process(main))

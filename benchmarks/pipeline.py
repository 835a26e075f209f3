"""What the main job pays for being a pipeline: seconds in which no text was read, no model trained, nothing measured.

    .venv/bin/python benchmarks/pipeline.py [experiments/smoke.yaml section.field=value …]

Minutes on 2 cores. From an empty home, with a temporary Prefect server and MLflow in SQLite, as `make run` does. Work is, for a step
that is a process of its own, the time from the opening to the closing of its journal; for the others (data, report) the step's seconds in
timing.json. All the rest counts as overhead: starting Prefect and every process, importing, tracking (the model's registration too), waiting. What the
installation has prepared is not in it: the line names the empty databases that were copied (flows/servers/databases.py; `prepared`, [] without). Imports for the steps
run beside the data steps in a process of their own; where those wait for them it counts as overhead, where they only share the cores with them it does not
(about 3 CPU seconds). The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from figures import figure, print_figures
from ours import run_pipeline

from gptcore.journal import FILE_NAME, read_journal
from gptcore.store import read_json
from gptloom.flows.servers.databases import PLACES, prepared

GOAL_PERCENT = 5.0
IN_PROCESS = ("ingest", "vocabulary", "shards", "report")  # steps without a process of their own
TRACKING = ("register",)  # steps that only tell MLflow


def working_seconds(run: Path) -> dict[str, float]:
    """Seconds of work by step of a finished run. Raises KeyError when a step left no record."""
    steps: dict[str, float] = read_json(run / "timing.json")
    work = {step: seconds for step, seconds in steps.items() if step in IN_PROCESS}
    for journal in run.glob(f"*/**/{FILE_NAME}"):
        records = read_journal(journal)[0]
        assert (records[0]["kind"], records[-1]["kind"]) == ("open", "close"), journal
        work[str(journal.parent.relative_to(run))] = (records[-1]["time_ms"] - records[0]["time_ms"]) / 1e3
    for step in steps.keys() - TRACKING:
        assert step in work, f"step {step} has no journal of its own"
    # A journal below another one's folder was written by the same process where that one was open, and is counted there.
    return {step: s for step, s in work.items() if "/" not in step or step == "evaluate/samples"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", default="experiments/shakespeare.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="gptloom-bench-") as home:
        wall, result = run_pipeline(Path(home), args.experiment, *args.overrides)
        work = working_seconds(Path(home) / "runs" / result["run"])
    steps = sum(result["seconds"].values())
    total = sum(work.values())
    figures = [
        figure("orchestration, tracking and process starts", "%", [100 * (wall - total) / wall], goal=GOAL_PERCENT),
        figure("of it before, between and after the steps", "s", [wall - steps]),
        figure("of it inside the steps: process starts, imports, the last records", "s", [steps - total]),
        figure("main job, wall clock", "s", [wall]),
    ]
    print_figures(
        figures,
        work_seconds={step: round(seconds, 2) for step, seconds in work.items()},
        prepared=[prepared(package).name for package in PLACES if prepared(package).exists()],
    )


if __name__ == "__main__":
    main()

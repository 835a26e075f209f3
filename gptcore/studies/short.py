"""The short form of a study, as `gptloom run` has it: one measurement on the model that the run trained.

What every such process does around it: read the config, open shards, keep a journal, write NAME.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptcore.config import ExperimentConfig, UserError, load_config
from gptcore.device import choose_device
from gptcore.entry import process_parser, recording
from gptcore.shards import ShardSet
from gptcore.store import write_json


@dataclass(frozen=True)
class Subject:
    """What a short form measures: one run of the pipeline."""

    config: ExperimentConfig
    shards: ShardSet
    checkpoint: Path
    out: Path


@dataclass(frozen=True)
class Outcome:
    """Rows of a table, one sentence computed from them, metrics to compare runs by, and files written to `out`."""

    rows: list[dict[str, Any]]
    conclusion: str
    metrics: dict[str, float]
    extra: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()


def run_study(name: str, doc: str | None, measure: Callable[[Subject], Outcome], argv: list[str]) -> dict[str, Any]:
    """Parse the arguments, measure, record; the result as JSON-able numbers."""
    parser = process_parser(doc, "config", "experiment file (YAML)")
    parser.add_argument("--checkpoint", type=Path, help="trained model: a step_NNNNNN directory")
    args = parser.parse_args(argv)
    if args.shards is None or args.out is None or args.checkpoint is None:
        raise UserError(
            f"the {name} study needs --shards DIR, --out DIR and --checkpoint DIR; `gptloom run` gives it all three"
        )
    subject = Subject(load_config(args.config), ShardSet.open(args.shards), args.checkpoint, args.out)
    start = time.perf_counter()
    with recording(args.out, args.run, args.parent) as journal:
        train = subject.config.train
        journal.tags(choose_device(train.device, train.precision).tags())
        journal.params({"study": name, "checkpoint": str(args.checkpoint), "repeats": subject.config.studies.repeats})
        outcome = measure(subject)
        result = {
            "study": name,
            "rows": outcome.rows,
            "conclusion": outcome.conclusion,
            **outcome.extra,
            "seconds": time.perf_counter() - start,
        }
        journal.metrics(outcome.metrics | {"study/seconds": result["seconds"]}, tokens_seen=0)
        write_json(args.out / f"{name}.json", result)
        for file in (f"{name}.json", *outcome.files):
            journal.artifact(file)
    return result

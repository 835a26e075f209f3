"""The trainer as a process: see `gptcore.train`. A run that was stopped goes on from its newest checkpoint.

    python -m gptcore.train experiments/smoke.yaml [section.field=value …]

Without --shards it first makes them from `data.source`, which also takes pyarrow (and finds them again the next time).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from gptcore.config import ExperimentConfig, load_config
from gptcore.entry import process_parser, run_process
from gptcore.launch import launch
from gptcore.ranks import joined_ranks
from gptcore.shards import ShardSet, prepare
from gptcore.store import content_id, make_home
from gptcore.train.run import check_processes, run_training


def default_out(config: ExperimentConfig) -> Path:
    """One directory a config: the same call finds its own checkpoints again."""
    return make_home() / "runs" / f"{config.name}-{content_id(config.model_dump(mode='json'))[:8]}" / "train"


def main(argv: list[str]) -> dict[str, Any]:
    parser = process_parser(__doc__, "config", "experiment file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the experiment file")
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.overrides)
    if config.train.processes > 1 and "WORLD_SIZE" not in os.environ:
        check_processes(config.train)
        raise SystemExit(launch("gptcore.train", argv, config.train.processes))
    with joined_ranks() as ranks:
        if not ranks.is_first:
            logging.getLogger().setLevel(logging.WARNING)
        elif args.shards is None:
            args.shards = prepare(config, make_home()).shards
        ranks.wait()
        shards = ShardSet.open(args.shards or prepare(config, make_home()).shards)
        out: Path = args.out or default_out(config)
        return {"run": args.run or out.resolve().name, **run_training(config, shards, out, ranks, args.run, args.parent)}


if __name__ == "__main__":
    raise SystemExit(run_process(main))

"""`python -m gptcore.shards CONFIG.yaml [section.field=value …]`: corpus, vocabulary and shards, built or found; prints where they are."""

from dataclasses import asdict
from typing import Any

from gptcore.entry import read_experiment, run_process
from gptcore.shards import ShardSet, prepare
from gptcore.shards.build import COUNTS
from gptcore.store import make_home


def main(argv: list[str]) -> dict[str, Any]:
    prepared = prepare(read_experiment(argv), make_home())
    manifest = ShardSet.open(prepared.shards).manifest
    where = {name: str(directory) for name, directory in asdict(prepared).items()}
    return where | {key: manifest[key] for key in ("vocab_size", *COUNTS)}


if __name__ == "__main__":
    raise SystemExit(run_process(main))

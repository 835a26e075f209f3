"""Seconds and losses of the main job, from an empty home: text fetched, model trained, everything compared.

    .venv/bin/python benchmarks/main_job.py --runs 3        # make bench: one run

Minutes on 2 cores. The last line on stdout is one JSON object; the goals are the ones the README promises.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from figures import figure, print_figures
from ours import run_pipeline

GOAL_SECONDS, GOAL_LOSS = 600.0, 1.75  # on 2 CPU cores


def build_figures(seconds: list[float], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per figure, the median over runs with lowest and highest: seconds, nats per token, bits per byte. No peer yet."""
    return [
        figure("main job, wall clock", "s", seconds, goal=GOAL_SECONDS),
        figure("main job, validation loss", "nats per token", [r["val_loss"] for r in results], goal=GOAL_LOSS),
        figure("main job, bits per byte", "bits", [r["val_bpb"] for r in results]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1, help="runs, each with another seed and an empty home")
    args = parser.parse_args()
    seconds, results = [], []
    for run in range(args.runs):
        with tempfile.TemporaryDirectory(prefix="gptloom-bench-") as home:
            wall, result = run_pipeline(Path(home), "experiments/shakespeare.yaml", f"train.seed={1337 + run}")
        seconds.append(round(wall, 1))
        results.append(result)
    print_figures(build_figures(seconds, results))


if __name__ == "__main__":
    main()

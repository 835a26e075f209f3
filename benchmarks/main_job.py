"""Seconds and losses of the main job, from an empty home: text fetched, model trained, everything compared.

    .venv/bin/python benchmarks/main_job.py        # or: make bench

Minutes on 2 cores. The last line on stdout is one JSON object; the goals are the ones the README promises.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "flows.cli", "run", "experiments/shakespeare.yaml"]
GOAL_SECONDS, GOAL_LOSS = 600.0, 1.75  # on 2 CPU cores


def build_figures(seconds: float, result: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per figure: wall-clock seconds, validation loss (nats per token), bits per byte. No peer yet, one run."""
    figures = [
        ("main job, wall clock", "s", seconds, GOAL_SECONDS),
        ("main job, validation loss", "nats per token", result["val_loss"], GOAL_LOSS),
        ("main job, bits per byte", "bits", result["val_bpb"], None),
    ]
    shared = {"peer": None, "ratio": None, "n": 1, "spread": None}
    return [
        {
            "name": name,
            "unit": unit,
            "ours": ours,
            "goal": goal,
            "met": None if goal is None else ours <= goal,
            **shared,
        }
        for name, unit, ours, goal in figures
    ]


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="gptloom-bench-") as home:
        start = time.perf_counter()
        env = {**os.environ, "GPTLOOM_HOME": home}
        run = subprocess.run(COMMAND, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        seconds = round(time.perf_counter() - start, 1)
    result = json.loads(run.stdout.splitlines()[-1])
    if run.returncode != 0:
        print(json.dumps({"error": result["error"]}), flush=True)
        return run.returncode
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(
        json.dumps({"figures": build_figures(seconds, result), "machine": machine, "command": "make bench"}), flush=True
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

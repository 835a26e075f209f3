"""Our side of a comparison: `python -m gptcore.train` as a process, timed from its start to its end. A module, not a script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cards import seeing
from figures import say

from gptcore.config import load_config
from gptcore.entry import python_environment
from gptcore.journal import read_journal
from gptcore.shards import prepare

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class OurRun:
    """seconds: from process start to its end; result: the trainer's last line; evaluations: (step, val loss, training seconds)."""

    seconds: float
    result: dict[str, Any]
    evaluations: list[tuple[int, float, float]]


def make_shards(experiment: str, text: Path | str, home: Path, *overrides: str) -> Path:
    """The shards, before any clock runs: the peer's data too are made beforehand."""
    return prepare(load_config(ROOT / "experiments" / experiment, [f"data.source={text}", *overrides]), home).shards


def make_toy_shards(folder: Path) -> Path:
    """Shards of a short text, where tokens are random and a trainer only wants to have some."""
    text = folder / "text.txt"
    text.write_text("To be, or not to be, that is the question.\n\n" * 2000, encoding="utf-8")
    return make_shards("tiny.yaml", text, folder, "data.split=tail")


def run_pipeline(home: Path, experiment: str, *overrides: str) -> tuple[float, dict[str, Any]]:
    """Wall seconds of `gptloom run` with this home, and its last line. Where it fails, this process ends with its error and exit code."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "gptloom.flows.command.cli", "run", experiment, *overrides]
    variables = {**os.environ, "GPTLOOM_HOME": str(home)}
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    result = json.loads(done.stdout.splitlines()[-1])
    if done.returncode != 0:
        print(json.dumps({"error": result["error"]}), flush=True)
        raise SystemExit(done.returncode)
    return seconds, result


def train(
    experiment: str, text: Path | str, shards: Path, out: Path, *overrides: str, shared_card: str | None = None
) -> OurRun:
    """One run of an experiment; raises RuntimeError with its last lines when it fails.

    shared_card: the GPU it runs on without waiting for its turn, so that runs whose time is not asked for can share it.
    """
    command = [sys.executable, "-m", "gptcore.train", str(ROOT / "experiments" / experiment), f"data.source={text}"]
    command += [*overrides, "--shards", str(shards), "--out", str(out)]
    variables = python_environment() | seeing(shared_card)
    if shared_card is not None:  # the lock of a device lies where temporary files do
        own = out.with_name(f"{out.name}-tmp")
        own.mkdir()
        variables["TMPDIR"] = str(own)
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=out.parent)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"our side failed:\n{done.stderr[-3000:]}")
    run = OurRun(seconds, json.loads(done.stdout.splitlines()[-1]), evaluations(out))
    say(f"{out.name}: {seconds:.1f} s, val {run.result['val_loss']:.4f}, {done.stderr.splitlines()[-1]}")
    return run


def evaluations(out: Path) -> list[tuple[int, float, float]]:
    """(step, validation loss, seconds of steps until then), from the journal: training time without evaluation and compiling."""
    found, seconds, done = [], 0.0, 0
    for record in read_journal(out / "metrics.jsonl")[0]:
        if record["kind"] != "metrics":
            continue
        values = record["values"]
        if "perf/tok_per_sec" in values:
            seconds += (record["tokens_seen"] - done) / values["perf/tok_per_sec"]
            done = record["tokens_seen"]
        if "val/loss" in values:
            found.append((record["step"], values["val/loss"], seconds))
    return found

"""One training as a process that can be stopped at any moment, and what it left. A module for the tests beside it.

Every fault test asks the same question: does the run end with the bits, and the curve, of a run that nothing happened to?
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gptcore.config import ExperimentConfig, dump_yaml
from gptcore.journal import read_journal
from gptcore.shards import ShardSet
from gptcore.store import hash_file

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass
class Training:
    """`python -m gptcore.train` of one config into one directory, started as often as it takes."""

    config: ExperimentConfig
    shards: ShardSet
    out: Path

    @property
    def arguments(self) -> list[str]:
        path = self.out.with_suffix(".yaml")
        path.write_text(dump_yaml(self.config))
        return ["-m", "gptcore.train", str(path), "--shards", str(self.shards.directory), "--out", str(self.out)]

    def start(self, *launcher: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *launcher, *self.arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )

    def finish(self, *launcher: str) -> str:
        """Run to the end, from wherever it was; returns what it said to people."""
        process = self.start(*launcher)
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
        return said

    def is_stepping(self) -> bool:
        """Whether this attempt has trained: its journal has a metrics line of its own."""
        records, _ = read_journal(self.out / "metrics.jsonl")
        return bool(records) and records[-1]["kind"] == "metrics"

    def has_grown(self) -> Callable[[], bool]:
        """Asks whether the journal has grown since now: the attempt just started has opened it."""
        journal = self.out / "metrics.jsonl"
        lines = len(read_journal(journal)[0])
        return lambda: len(read_journal(journal)[0]) > lines

    def is_saving(self) -> bool:
        return any((self.out / "checkpoints").glob(".step_*.tmp"))

    def weights_sha256(self) -> str:
        return hash_file(self.checkpoint / "model.safetensors")

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoints" / f"step_{self.config.train.max_steps:06d}"

    def curve(self, key: str = "train/loss") -> dict[int, float]:
        """Loss by tokens seen, the first value of each, as MLflow gets it."""
        points: dict[int, float] = {}
        for record in read_journal(self.out / "metrics.jsonl")[0]:
            if record["kind"] == "metrics" and key in record["values"]:
                points.setdefault(record["tokens_seen"], record["values"][key])
        return points


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60.0) -> bool:
    """As soon as it is true; False when the process ended first."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)
    return True

"""Killed and resumed on a GPU in deterministic mode: the same weights? And what that mode and a save cost, in ms.

    .venv/bin/python benchmarks/recovery.py [section.field=value …]      # about two minutes on one GPU
    … --pairs 0 --seconds 400      # only kills, more of them

A text is made up, so nothing is needed but the code. One run is left alone; another one of the same config is SIGKILLed at random
moments, every second time in the middle of a save, and resumed until it ends. Steps of both modes are timed in turns in one process,
a save is as the uninterrupted run's journal has it. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

from figures import figure, print_figures, say
from ours import ROOT, make_shards

from gptcore.config import ExperimentConfig, dump_yaml, load_config, with_changes
from gptcore.device import set_determinism
from gptcore.entry import python_environment
from gptcore.journal import FILE_NAME, read_journal
from gptcore.shards import ShardSet
from gptcore.store import hash_file
from gptcore.train import build_trainer, train_step

EXPERIMENT = "tinyshakespeare-gpu.yaml"
# What has a state of its own stays in: dropout, a moving average, Muon and AdamW.
SETTINGS = (
    "train.device=auto train.cuda_graph=off train.select=last train.max_steps=600 train.save_interval=30 train.log_interval=5 "
    "train.eval_interval=200 train.eval_tokens=65536"
)
FILES = ("model.safetensors", "optimizer.safetensors")


def write_text(path: Path, n_bytes: int = 1 << 20) -> Path:
    """Words of a made-up language, frequent ones more often, the same every time."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioubdfgklmnprstvz", k=rng.randint(2, 9))) for _ in range(3000)]
    lines = [" ".join(rng.choices(words, [1 / (n + 3) for n in range(3000)], k=12)) for _ in range(n_bytes // 70)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


class Run:
    """One config in one directory, trained by a process that may be killed."""

    def __init__(self, config: ExperimentConfig, shards: Path, out: Path) -> None:
        self.out = out
        file = out.with_suffix(".yaml")
        file.write_text(dump_yaml(config), encoding="utf-8")
        self._command = [sys.executable, "-m", "gptcore.train", str(file), "--shards", str(shards), "--out", str(out)]
        self._log = out.with_suffix(".log")

    def start(self) -> subprocess.Popen[bytes]:
        with open(self._log, "ab") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log, env=python_environment())

    def finish(self) -> None:
        if self.start().wait():
            self._fail()

    def _fail(self) -> NoReturn:
        raise RuntimeError(f"{self.out.name} failed:\n{self._log.read_text()[-3000:]}")

    def kill(self, rng: random.Random, seconds: float, *, in_a_save: bool) -> dict[str, Any] | None:
        """Start or resume it, and SIGKILL it up to `seconds` after its first steps; None when it was done before."""
        before = len(self._metrics())
        process = self.start()
        wait_until(lambda: len(self._metrics()) > before, process)
        time.sleep(rng.uniform(0.0, seconds))
        is_save = in_a_save and wait_until(lambda: any(self.out.glob("checkpoints/.step_*.tmp")), process)
        process.kill()
        if process.wait() == 0:
            return None
        if process.returncode > 0:
            self._fail()
        return {"step": self._metrics()[-1]["step"], "in_a_save": is_save}

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [r for r in read_journal(self.out / FILE_NAME)[0] if r["kind"] == kind]

    def _metrics(self) -> list[dict[str, Any]]:
        return [r for r in self.records("metrics") if r["step"]]

    def values(self, key: str) -> list[float]:
        return [r["values"][key] for r in self._metrics() if key in r["values"]]

    def seconds(self) -> float:
        """From the first report to the last one."""
        times = [r["time_ms"] for r in self._metrics()]
        return (times[-1] - times[0]) / 1e3

    def _last_files(self) -> list[Path]:
        return [max(self.out.glob("checkpoints/step_*")) / name for name in FILES]

    def sha256(self) -> list[str]:
        return [hash_file(path) for path in self._last_files()]

    def checkpoint_mib(self) -> float:
        return sum(path.stat().st_size for path in self._last_files()) / 2**20


def wait_until(condition: Any, process: subprocess.Popen[bytes]) -> bool:
    """As soon as it is true; False when the process ended first."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    return True


def step_ms(config: ExperimentConfig, shards: Path, pairs: int, steps: int) -> dict[bool, list[float]]:
    """Milliseconds a step by `train.deterministic`: means over blocks of `steps`, one of each in turns."""
    opened, trainers, found = ShardSet.open(shards), {}, {True: [], False: []}
    # The first pair builds and compiles, deterministic first: cuBLAS reads its workspace once, on a Hopper the usual size anyway.
    for block in range(-1, pairs):
        for mode in (True, False) if block % 2 else (False, True):
            if mode not in trainers:
                trainers[mode] = build_trainer(with_changes(config, train={"deterministic": mode}), opened)
            trainer = trainers[mode]
            set_determinism(mode, trainer.device)
            with trainer.device.attention(config.model.dropout):
                trainer.device.synchronize()
                start = time.perf_counter()
                for _ in range(steps):
                    train_step(trainer)
                trainer.device.synchronize()
            if block >= 0:
                found[mode].append(1e3 * (time.perf_counter() - start) / steps)
    set_determinism(False, trainer.device)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--experiment", default=EXPERIMENT, help="a file of experiments/")
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=6, help="blocks of steps in each mode; 0: no timing")
    parser.add_argument("--steps", type=int, default=30, help="steps of a block")
    parser.add_argument("--seconds", type=float, default=150, help="no further kill when the rest would end later")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_intermixed_args()
    began, rng = time.perf_counter(), random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="gptloom-bench-") as name:
        folder = Path(name)
        text = write_text(folder / "text.txt")
        changes = [f"data.source={text}", *SETTINGS.split(), "train.deterministic=true", *args.overrides]
        config = load_config(ROOT / "experiments" / args.experiment, changes)
        shards = make_shards(args.experiment, text, folder)
        whole, killed = Run(config, shards, folder / "whole"), Run(config, shards, folder / "killed")
        start = time.perf_counter()
        whole.finish()
        start_s = time.perf_counter() - start - whole.seconds()  # of a process, compiling included
        say(f"uninterrupted: {start_s:.1f} s to start, {whole.seconds():.1f} s of steps, {whole.sha256()[0][:16]}…")
        kills: list[dict[str, Any]] = []
        attempt_s = 0.0
        timing_s = start_s if args.pairs else 0.0  # it compiles the other mode
        # After the last kill comes one more attempt.
        while len(kills) < args.kills and time.perf_counter() - began + 2 * attempt_s + timing_s < args.seconds:
            start = time.perf_counter()
            kill = killed.kill(rng, 0.8 * whole.seconds() / args.kills, in_a_save=len(kills) % 2 == 1)
            if kill is None:
                break
            attempt_s = time.perf_counter() - start
            kills.append(kill)
            say(f"killed after step {kill['step']}{', in a save' if kill['in_a_save'] else ''}; {attempt_s:.1f} s an attempt")
        killed.finish()
        is_same = whole.sha256() == killed.sha256()
        say(f"killed {len(kills)} times: {killed.sha256()[0][:16]}…, {'the same bits' if is_same else 'OTHER BITS'}")
        stalls, writes = whole.values("perf/save_stall_ms"), whole.values("perf/save_ms")
        totals = [sum(both) for both in zip(stalls, writes, strict=True)]
        say(f"a save: {statistics.median(stalls):.1f} ms of standstill, {statistics.median(totals):.0f} until committed")
        claim = "kills after which weights and optimizer state ended as the uninterrupted run's"
        survived = figure(claim, "kills", [len(kills) * is_same], goal=max(1, len(kills)), goal_is="at least")
        figures = [
            survived | {"n": len(kills)},
            figure("a save: the training stands still", "ms", stalls),
            figure("a save: from its beginning until it is committed", "ms", totals),
        ]
        normal: list[float] = []
        if args.pairs:
            ms = step_ms(config, shards, args.pairs, args.steps)
            normal = [round(value, 3) for value in ms[False]]
            say(f"a step: {statistics.median(ms[True]):.2f} ms deterministic, {statistics.median(ms[False]):.2f} normal")
            figures.append(figure("a step in deterministic mode, against normal mode", "ms", ms[True], peer=ms[False]))
        print_figures(
            figures,
            kills=kills,
            sha256={"uninterrupted": whole.sha256(), "killed": killed.sha256()},
            normal_ms=normal,
            parameters=int(whole.records("params")[0]["values"]["parameters"]),
            checkpoint_mib=round(whole.checkpoint_mib(), 1),
            seconds=round(time.perf_counter() - began, 1),
        )
    return 0 if survived["met"] else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""What it costs that nothing is believed unread: `gptloom data` and a training, with hashes and without, in turns.

    .venv/bin/python benchmarks/verify.py                              # 1 GB of text, 5 minutes of training a side: an hour on two cores
    .venv/bin/python benchmarks/verify.py --mb 64 --pairs 1 --seconds 20      # does it work?

A text is made up, so nothing is needed but the code. Data: `python -m gptcore.shards`, which does the steps of `gptloom data` without
Prefect, from nothing and when all is there. Training: as many steps as take --seconds, on these shards. The side without hashes is the
same code, with the functions that hash taken out when a process starts. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from figures import figure, print_figures, say
from ours import ROOT, train

from gptcore.entry import python_environment
from gptcore.shards import ShardSet
from gptcore.store import hash_file

EXPERIMENT = "tinyshakespeare-cpu.yaml"
FILE_BYTES = 16 << 20
# Python imports this at its start, before ours.
WITHOUT = """
import json
from pathlib import Path
from gptcore import store
from gptcore.corpus import chunks

def stated(path, hash_file=store.hash_file):
    manifest = path.parent / store.MANIFEST
    return json.loads(manifest.read_bytes())["files"][path.name]["sha256"] if manifest.exists() else hash_file(path)

store._known_hash = stated
chunks._hash_group = lambda *_: ""
"""


def write_texts(folder: Path, n_bytes: int) -> Path:
    """Files of made-up sentences, no two alike, the same every time."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"aeioubdfgklmnprstvz", dtype=np.uint8)
    words = [letters[rng.integers(0, 19, size)].tobytes() for size in rng.integers(2, 9, 20_000)]
    common = (20_000 * rng.random((100_000, 12)) ** 3).astype(np.int64)  # some words are frequent
    lines = [b" ".join([words[number] for number in row]) for row in common.tolist()]
    per_file = FILE_BYTES * len(lines) // sum(map(len, lines))
    for number in range(max(1, n_bytes // FILE_BYTES)):
        chosen = rng.integers(0, len(lines), per_file)
        paragraphs = (b"\n".join([lines[at] for at in part]) for part in np.array_split(chosen, per_file // 8))
        (folder / f"{number:05d}.txt").write_bytes(b"\n\n".join(paragraphs))
    return folder


class Side:
    """One home; its processes hash, or do not."""

    def __init__(self, name: str, folder: Path, text: Path) -> None:
        self.name, self.home, self.text = name, folder / name, text
        self.variables = {"GPTLOOM_HOME": str(self.home)}
        if name == "without":
            (folder / "hook").mkdir()
            (folder / "hook" / "sitecustomize.py").write_text(WITHOUT, encoding="utf-8")
            self.variables["PYTHONPATH"] = f"{folder / 'hook'}{os.pathsep}{ROOT}"

    def data(self) -> tuple[float, float]:
        """Seconds of a process that makes the data, or finds it, and CPU seconds of it and its workers."""
        command = [sys.executable, "-m", "gptcore.shards", str(ROOT / "experiments" / EXPERIMENT), f"data.source={self.text}"]
        command += ["vocab.kind=bpe", "vocab.size=8192", "data.val_fraction=0.001", "data.split=auto"]
        start, before = time.perf_counter(), os.times()
        subprocess.run(command, check=True, capture_output=True, env=python_environment() | self.variables)
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return time.perf_counter() - start, cpu

    def shards(self) -> Path:
        (found,) = (self.home / "data" / "shards").iterdir()
        return found

    def train(self, out: Path, steps: int) -> float:
        """Seconds of a process that trains so many steps."""
        before = dict(os.environ)
        os.environ.update(self.variables)
        try:
            changes = [f"train.max_steps={steps}", "train.minutes=null", "evaluate.batch_size=32", "train.eval_tokens=65536"]
            return train(EXPERIMENT, self.text, self.shards(), out, *changes, "vocab.kind=bpe", "train.select=last").seconds
        finally:
            os.environ.clear()
            os.environ.update(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1000, help="megabytes of text (default: 1000)")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side (default: 3)")
    parser.add_argument("--seconds", type=float, default=300.0, help="of training, about, a run (default: 300); 0: no training")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gptloom-bench-") as name:
        folder = Path(name)
        text = write_texts(folder / "text", args.mb * 1_000_000)
        sides = [Side("with", folder, text), Side("without", folder, text)]
        fresh: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
        cached: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
        for pair in range(args.pairs):
            for side in sides if pair % 2 else reversed(sides):
                shutil.rmtree(side.home, ignore_errors=True)
                fresh[side.name].append(side.data())
                say("data from nothing, {} hashes: {:.2f} s, {:.2f} s of CPU".format(side.name, *fresh[side.name][-1]))
        for pair in range(2 * args.pairs):
            for side in sides if pair % 2 else reversed(sides):
                cached[side.name].append(side.data())
                say("data that is there, {} hashes: {:.2f} s, {:.2f} s of CPU".format(side.name, *cached[side.name][-1]))
        opened = ShardSet.open(sides[0].shards())
        files = [path for path in sides[0].home.rglob("*") if path.suffix in (".parquet", ".bin")]
        start = time.perf_counter()
        for path in files:
            hash_file(path)
        rate = sum(path.stat().st_size for path in files) / 1e6 / (time.perf_counter() - start)
        say(f"one thread hashes {rate:.0f} MB/s")
        figures = [figure("one thread hashes", "MB/s", [rate], goal=1000, goal_is="at least")]
        for what, took in (("data from nothing", fresh), ("data that is there", cached)):
            ours, peer = took["with"], took["without"]
            figures.append(figure(what, "s", [wall for wall, _ in ours], peer=[wall for wall, _ in peer], in_turns=True))
            more = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(ours, peer, strict=True)]
            figures.append(figure(f"{what}: seconds more", "s", [wall for wall, _ in more], goal=1.0, of="median"))
            figures.append(figure(f"{what}: CPU seconds more", "s", [cpu for _, cpu in more]))
        if args.seconds:
            figures.append(measure_training(sides, folder, args.seconds, args.pairs))
        sizes = {path.suffix[1:]: 0 for path in files}
        for path in files:
            sizes[path.suffix[1:]] += path.stat().st_size
        print_figures(
            figures, text_mb=args.mb, mb={kind: round(size / 1e6) for kind, size in sizes.items()}, tokens=opened.n_tokens
        )
    return 0 if all(found["met"] is not False for found in figures) else 1


def measure_training(sides: list[Side], folder: Path, seconds: float, pairs: int) -> dict[str, object]:
    """The same number of steps, about `seconds` of them, by either side in turns."""
    short, long = (sides[0].train(folder / f"calibrate-{steps}", steps) for steps in (20, 120))
    steps = max(20, int(100 * seconds / (long - short)))
    took: dict[str, list[float]] = {side.name: [] for side in sides}
    for pair in range(pairs):
        for side in sides if pair % 2 else reversed(sides):
            took[side.name].append(side.train(folder / f"{side.name}-{pair}", steps))
            say(f"{steps} steps, {side.name} hashes: {took[side.name][-1]:.1f} s")
    return figure(f"{steps} steps of training", "s", took["with"], peer=took["without"], in_turns=True, goal=1.02, of="ratio")


if __name__ == "__main__":
    raise SystemExit(main())

"""Tokens a second of batch loading: ours against one NumPy slice per row, as nanoGPT's `get_batch` does it.

    .venv/bin/python benchmarks/batches.py [--tokens 100000000] [--repeats 7]

Both read one memory-mapped file of uint16 ids and make int64 inputs and targets of shape (B, T); they take turns, and the
median round counts. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from figures import figure, print_figures, say

from gptcore.batches import BatchSampler
from gptcore.shards import ShardWriter, map_shard

SHAPES = ((64, 256), (480, 1024))
GOAL = 10.0  # times the peer
FINGERPRINT = "0" * 64


def slice_per_row(path: Path, B: int, T: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """nanoGPT's way, without its conversion to torch: map the file, then one slice per row, stacked."""
    data = np.memmap(path, dtype=np.uint16, mode="r", offset=1024)
    starts = rng.integers(0, len(data) - T, B)
    x = np.stack([data[i : i + T].astype(np.int64) for i in starts])
    y = np.stack([data[i + 1 : i + 1 + T].astype(np.int64) for i in starts])
    return x, y


def measure(call: Callable[[int], object], tokens: int, seconds: float) -> float:
    """Tokens a second of `call(0)`, `call(1)`, … over about so many seconds."""
    start = time.perf_counter()
    done = 0
    while time.perf_counter() - start < seconds:
        call(done)
        done += 1
    return done * tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000, help="ids in the file (2 bytes each), one shard at most")
    parser.add_argument("--repeats", type=int, default=7, help="rounds per shape")
    parser.add_argument("--seconds", type=float, default=1.0, help="time of one side in one round")
    args = parser.parse_args()
    figures = []
    with tempfile.TemporaryDirectory(prefix="gptloom-bench-") as folder:
        writer = ShardWriter(Path(folder), "train", 50_257, FINGERPRINT)
        rng = np.random.default_rng(0)
        while writer.n_tokens < args.tokens:
            writer.append(rng.integers(0, 50_257, min(10_000_000, args.tokens - writer.n_tokens), dtype=np.uint16))
        writer.close()
        path = Path(folder) / writer.names[0]
        tokens = map_shard(path, FINGERPRINT)
        int(tokens.max())  # both sides find the file in memory
        for B, T in SHAPES:
            sampler = BatchSampler(tokens, T, seed=1)
            ours, peer = [], []
            for _ in range(args.repeats):
                peer.append(measure(lambda _: slice_per_row(path, B, T, rng), B * T, args.seconds))  # noqa: B023
                ours.append(measure(lambda i: sampler.batch(i * B, B), B * T, args.seconds))  # noqa: B023
            goals: dict[str, Any] = {"goal": GOAL, "goal_is": "at least", "of": "ratio", "in_turns": True}
            figures.append(figure(f"batches ({B}, {T})", "tokens per second", ours, peer=peer, digits=0, **goals))
            say(str(figures[-1]))
    print_figures(figures, numpy=np.__version__)


if __name__ == "__main__":
    main()

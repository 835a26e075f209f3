"""GPT-2 124M on one GPU: training tokens a second against nanoGPT's bench.py, both on random tokens.

    .venv/bin/python benchmarks/throughput.py --peer-dir DIR [--batches 32 64] [--precisions bf16 fp8]      # 3 to 6 minutes

Ours is experiments/gpt2-124m.yaml: 12 layers of 768, context 1024, vocabulary 50,304, 6 heads (`--set model.n_head=12` for as many as GPT-2
has). One step is forward, backward, clipping and optimizer. MFU: (6N + 12·L·C·T) FLOPs a
token against the card's bf16 peak, also where fp8 ran. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from figures import figure, print_figures, say
from ours import ROOT, make_toy_shards
from scaling_process import RandomTokens

from gptcore.config import load_config
from gptcore.shards import ShardSet
from gptcore.train import Trainer, build_trainer, train_step

EXPERIMENT = "gpt2-124m.yaml"
V, T = 50_304, 1024
GOAL = 1.5


def make_trainer(shards: ShardSet, batch: int, precision: str, changes: list[str]) -> Trainer:
    """The committed experiment's model and optimizer on random tokens; `shards` are only there because a trainer has some."""
    settings = ["data.source=none", f"train.global_batch_size={batch}", f"train.precision={precision}"]
    settings += ["train.max_steps=10000", "studies.accumulation=false", *changes]
    trainer = build_trainer(load_config(ROOT / "experiments" / EXPERIMENT, settings), shards)
    trainer.sampler = RandomTokens(trainer.device, T, V, by_sample=False)
    return trainer


def measure(trainer: Trainer, steps: int, repeats: int) -> list[float]:
    """Tokens a second, one figure a repeat of `steps` steps, after ten steps of warm-up."""
    for _ in range(10):
        train_step(trainer)
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            train_step(trainer)
        torch.cuda.synchronize()
        found.append(steps * trainer.tokens_per_step / (time.perf_counter() - start))
    trainer.watch.check(trainer.step, 0.0)
    return found


def measure_peer(directory: Path, batch: int) -> float:
    """nanoGPT's bench.py, compiled, on random tokens: tokens a second."""
    command = [sys.executable, "bench.py", "--real_data=False", f"--batch_size={batch}"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    found = re.findall(r"time per iteration: ([\d.]+)ms", done.stdout)
    if not found:
        raise RuntimeError(f"the peer failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return batch * T / (float(found[-1]) / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-dir", type=Path, help="a nanoGPT checkout; without it only our side runs")
    parser.add_argument("--peer-batches", type=int, nargs="*", default=[12], help="12 is nanoGPT's default")
    parser.add_argument("--batches", type=int, nargs="*", default=[32], help="our sequences per step")
    parser.add_argument("--precisions", nargs="*", default=["bf16", "fp8"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], metavar="section.field=value", help="changes to our config")
    args = parser.parse_args()
    peers = {b: [measure_peer(args.peer_dir, b)] for b in args.peer_batches} if args.peer_dir else {}
    found, mfu = [], {}
    with tempfile.TemporaryDirectory(prefix="gptloom-bench-") as name:
        shards = ShardSet.open(make_toy_shards(Path(name)))
        for precision in args.precisions:
            for batch in args.batches:
                torch._dynamo.reset()
                trainer = make_trainer(shards, batch, precision, args.set)
                with trainer.device.attention(0.0):
                    speeds = measure(trainer, args.steps, args.repeats)
                label = f"{precision}, batch {batch}"
                peak = trainer.device.peak_flops
                mfu[label] = peak and round(100 * trainer.model.flops_per_token() * max(speeds) / peak, 1)
                say(f"{label}: {speeds[-1]:,.0f} tok/s, MFU {mfu[label]} %, {trainer.device.peak_mib():,.0f} MiB")
                found.append((label, speeds))
                del trainer
                torch.cuda.empty_cache()
    for batch, speeds in peers.items():  # again, after ours: both sides saw the card cold and warm
        speeds.append(measure_peer(args.peer_dir, batch))
        say(f"peer, batch {batch}: {', '.join(f'{speed:,.0f}' for speed in speeds)} tok/s")
    default = peers.get(args.peer_batches[0]) if peers else None
    goals = {"goal": GOAL, "goal_is": "at least", "of": "ratio"} if default else {}
    figures = [figure(f"124M: {label}", "tok/s", speeds, peer=default, digits=0, **goals) for label, speeds in found]
    print_figures(figures, mfu_percent=mfu, peer_tok_per_sec=peers)


if __name__ == "__main__":
    main()

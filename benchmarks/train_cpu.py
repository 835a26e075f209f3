"""Character-level tinyshakespeare on a CPU, against nanoGPT's README setting: the same loss sooner, a better loss in the same time.

    .venv/bin/python benchmarks/train_cpu.py --peer-dir DIR --text input.txt      # about 15 minutes on 2 cores

Wall time from process start to its end, evaluation included; every model is evaluated on all validation tokens, each once, in
windows of its own context. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from figures import figure, print_figures, say
from ours import OurRun, make_shards, train
from peer import CPU_SETTING, Peer

from gptcore.config import UserError
from gptcore.device import choose_device

EXPERIMENT = "tinyshakespeare-cpu.yaml"
SAME_LOSS_SHARE, SAME_TIME_LOSS, GPU_LOSS, GPU_LOSS_SECONDS = 1 / 6, 1.53, 1.4697, 600.0
AROUND_SECONDS = 5.5  # start, preflight and the last evaluation of a run: what its wall time has beside train.minutes
# What learns most in that time, of the sizes and rates tried (experiments/LOG.md); the long run is the experiment as committed.
SETTINGS = {
    "sooner": "model.n_layer=1 model.block_size=64 train.lr=0.05 train.adamw_lr=0.03 train.warmup_steps=5 "
    "train.decay_fraction=1 train.weight_decay=0",
    "better": "model.n_layer=2 train.lr=0.03 train.adamw_lr=0.02 train.warmup_steps=10 train.decay_fraction=1",
    "long": "",
}
EVALUATION = ("train.eval_tokens=2048", "evaluate.batch_size=64")  # the last one is of all tokens whatever this says


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-dir", type=Path, required=True, help="a nanoGPT checkout")
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare's input.txt")
    parser.add_argument("--runs", type=int, default=1, help="repeats of everything, ours with other seeds")
    parser.add_argument("--peer-iterations", type=int, default=2000, help="fewer only to try this script out")
    parser.add_argument("--parts", default="sooner,better,long", help="which of the three comparisons")
    args = parser.parse_args()
    text, parts = args.text.resolve(), args.parts.split(",")
    precision = fastest_precision()
    peer_seconds, peer_losses, runs = [], [], {part: [] for part in parts}
    with tempfile.TemporaryDirectory(prefix="gptloom-bench-") as name:
        folder = Path(name)
        peer, shards = Peer.of_characters(args.peer_dir, text, folder), make_shards(EXPERIMENT, text, folder)
        for number in range(args.runs):
            iterations = f"--max_iters={args.peer_iterations}"
            theirs = peer.train(
                f"out{number}", *CPU_SETTING.split(), iterations, iterations.replace("max_iters", "lr_decay_iters")
            )
            peer_seconds.append(theirs.seconds)
            peer_losses.append(peer.evaluate(peer.load(theirs.checkpoint)))
            say(f"peer: {theirs.seconds:.1f} s, val {peer_losses[-1]:.4f}")
            budgets = {"sooner": theirs.seconds * SAME_LOSS_SHARE, "better": theirs.seconds, "long": GPU_LOSS_SECONDS}
            for part in parts:
                minutes = max(3.0, budgets[part] - AROUND_SECONDS) / 60
                out = folder / f"{part}{number}"
                settings = (f"train.minutes={minutes:.4f}", f"train.seed={1337 + number}", f"train.precision={precision}")
                runs[part].append(train(EXPERIMENT, text, shards, out, *SETTINGS[part].split(), *EVALUATION, *settings))
    print_figures(build_figures(peer_seconds, peer_losses, runs), precision=precision)


def fastest_precision() -> str:
    """bf16 where the processor has instructions for it."""
    try:
        return choose_device("cpu", "bf16").precision
    except UserError:
        return "fp32"


def build_figures(
    peer_seconds: list[float], peer_losses: list[float], runs: dict[str, list[OurRun]]
) -> list[dict[str, object]]:
    """Seconds and losses of the parts that ran."""
    # What the goal for the time is and is about, and the largest loss.
    goals = {
        "sooner": (round(SAME_LOSS_SHARE, 4), "ratio", max(peer_losses)),
        "better": (1.0, "ratio", SAME_TIME_LOSS),
        "long": (GPU_LOSS_SECONDS, "ours", GPU_LOSS),
    }
    found: list[dict[str, object]] = []
    for part in [part for part in goals if part in runs]:
        seconds, losses = ([run.seconds for run in runs[part]], [run.result["val_loss"] for run in runs[part]])
        goal, of, loss = goals[part]
        found.append(figure(f"{part}: wall time", "s", seconds, peer=peer_seconds, goal=goal, of=of, digits=1))
        found.append(figure(f"{part}: validation loss", "nats per token", losses, peer=peer_losses, goal=round(loss, 4)))
    return found


if __name__ == "__main__":
    main()

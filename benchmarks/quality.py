"""GPT-2 124M from scratch at equal tokens: our validation loss against nanoGPT's, so that speed is not bought with quality.

    .venv/bin/python benchmarks/quality.py --peer-dir DIR [--text 'FOLDER/**/*.py'] [--tokens 50000000] [--runs 2]      # 7 minutes on 4 GPUs

Without --text: the Python sources of this interpreter's packages. Both sides read the same byte-pair shards, in steps of 64
sequences of 1,024 tokens, with a warmup and a decay that fit the horizon. Each side tries two peak learning rates with every seed, and the
better one counts. Every model is evaluated on the same validation tokens, each once. Runs go to all GPUs, one to each. The last line on
stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import sysconfig
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from cards import lent, visible_cards
from figures import figure, print_figures, say
from ours import ROOT, make_shards, train
from peer import Peer

from gptcore.config import load_config
from gptcore.shards import ShardSet

EXPERIMENT = "gpt2-124m.yaml"
BATCH, CONTEXT = 64, 1024
MAX_VAL_TOKENS = 128 * 16 * CONTEXT  # whole batches of our evaluation
PEER_RATES = (6e-4, 1.5e-3)  # its default for this size, and more, since 50 million tokens are few
OUR_FACTORS = (1.0, 2.0)  # of both of the experiment's rates
FIRST_SEED = 1337  # nanoGPT's


def mean_by_rate(losses: dict[float, list[Future[float]]]) -> dict[float, list[float]]:
    """Losses of every rate, one a seed; the best rate, by its mean, first."""
    found = {rate: [future.result() for future in futures] for rate, futures in losses.items()}
    return dict(sorted(found.items(), key=lambda item: statistics.fmean(item[1])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-dir", type=Path, required=True, help="a nanoGPT checkout")
    parser.add_argument("--text", help="file, folder or glob; default: this interpreter's Python sources")
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--runs", type=int, default=2, help="seeds of each side's best learning rate")
    parser.add_argument("--out", type=Path, help="keep shards and runs there; default: a folder that is deleted")
    parser.add_argument("--precision", default="fp8", help="of our side; the speed that is claimed is that of fp8")
    args = parser.parse_args()
    text = args.text or f"{sysconfig.get_paths()['purelib']}/**/*.py"
    steps = args.tokens // (BATCH * CONTEXT)
    with tempfile.TemporaryDirectory(prefix="gptloom-bench-") as name:
        folder = (args.out or Path(name)).resolve()
        directory = make_shards(EXPERIMENT, text, folder, "data.invalid_text=skip")
        shards = ShardSet.open(directory)
        train_tokens, val = shards.tokens("train"), shards.tokens("val")
        say(f"{len(train_tokens):,} training tokens, {len(val):,} for validation")
        peer = Peer(args.peer_dir, folder, "sources", train_tokens[:], val[: MAX_VAL_TOKENS + 1])

        cards: queue.SimpleQueue[str] = queue.SimpleQueue()
        for card in visible_cards():
            cards.put(card)
        seeds = range(FIRST_SEED, FIRST_SEED + args.runs)
        scripts = {seed: peer.script_with_seed(seed) for seed in seeds}  # before runs of one seed start side by side
        committed = load_config(ROOT / "experiments" / EXPERIMENT, [f"data.source={text}"]).train

        def theirs(rate: float, seed: int) -> float:
            settings = (
                f"--dataset=sources --max_iters={steps} --lr_decay_iters={steps} --warmup_iters={steps // 10} "
                f"--learning_rate={rate} --min_lr={rate / 10} --batch_size=32 --gradient_accumulation_steps=2 "
                f"--eval_interval={steps} --eval_iters=20 --always_save_checkpoint=True"
            )
            with lent(cards) as card:
                run = peer.train(f"peer-{rate}-{seed}", *settings.split(), script=scripts[seed], card=card)
                device = f"cuda:{visible_cards().index(card)}"
                loss = peer.evaluate(peer.load(run.checkpoint, device), device)
            say(f"peer, learning rate {rate}, seed {seed}: {loss:.4f} in {run.seconds:.0f} s")
            return loss

        def ours(factor: float, seed: int) -> float:
            changes = (
                f"train.lr={committed.lr * factor} train.adamw_lr={committed.adamw_lr * factor} data.invalid_text=skip "
                f"train.global_batch_size={BATCH} train.max_tokens={steps * BATCH * CONTEXT} train.precision={args.precision} "
                f"train.eval_tokens={MAX_VAL_TOKENS} train.eval_interval={steps} train.seed={seed}"
            )
            with lent(cards) as card:
                out = folder / f"ours-{factor}-{seed}"
                run = train(EXPERIMENT, text, directory, out, *changes.split(), shared_card=card)
            return float(run.result["val_loss"])

        with ThreadPoolExecutor(16) as pool:  # all of both sides wait for a card at once
            peer_side = {rate: [pool.submit(theirs, rate, seed) for seed in seeds] for rate in PEER_RATES}
            our_side = {factor: [pool.submit(ours, factor, seed) for seed in seeds] for factor in OUR_FACTORS}
            our_losses, peer_losses = mean_by_rate(our_side), mean_by_rate(peer_side)
    ours_best, peer_best = (next(iter(losses.values())) for losses in (our_losses, peer_losses))
    found = figure("validation loss after equal tokens", "nats per token", ours_best, peer=peer_best, goal=1.0, of="ratio")
    print_figures([found], tokens=steps * BATCH * CONTEXT, our_losses_by_factor=our_losses, peer_losses_by_rate=peer_losses)


if __name__ == "__main__":
    main()

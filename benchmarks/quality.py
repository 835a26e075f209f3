"""GPT-2 124M from scratch at equal tokens: our validation loss against nanoGPT's, so that speed is not bought with quality.

    .venv/bin/python benchmarks/quality.py --peer-dir DIR [--text 'FOLDER/**/*.py'] [--tokens 50000000] [--runs 2]      # 7 minutes on 4 GPUs

Without --text: the Python sources of this interpreter's library and packages. Both sides read the same byte-pair shards, in steps of 64
sequences of 1,024 tokens, with a warmup and a decay that fit the horizon. Each searches three peak learning rates with its first seed;
the best of them is run again with other seeds. Every model is evaluated on the same validation tokens, each once. Runs go to all GPUs, one to
each. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cards import Cards, visible_cards
from figures import figure, print_figures
from ours import make_shards, train
from peer import Peer

from gptcore.shards import ShardSet

EXPERIMENT = "gpt2-124m.yaml"
BATCH, CONTEXT = 64, 1024
MAX_VAL_TOKENS = 128 * 16 * CONTEXT  # whole batches of our evaluation
PEER_RATES = (6e-4, 1.2e-3, 2.4e-3)  # from its default for this size upwards: 50 million tokens are few
OUR_FACTORS = (0.5, 1.0, 2.0)  # of both of the experiment's rates
OUR_RATES = {"train.lr": 0.02, "train.adamw_lr": 0.003}
FIRST_SEED = 1337  # nanoGPT's


def search(
    pool: ThreadPoolExecutor, run: Callable[[float, int], float], rates: tuple[float, ...], runs: int
) -> tuple[list[float], dict[float, float]]:
    """Losses of the best rate, one a seed, and what every rate gave with the first seed."""
    found = {rate: pool.submit(run, rate, FIRST_SEED) for rate in rates}
    searched = {rate: future.result() for rate, future in found.items()}
    best = min(searched, key=searched.__getitem__)
    others = [pool.submit(run, best, seed) for seed in range(FIRST_SEED + 1, FIRST_SEED + runs)]
    return [searched[best], *(future.result() for future in others)], searched


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-dir", type=Path, required=True, help="a nanoGPT checkout")
    parser.add_argument("--text", help="file, folder or glob; default: this interpreter's Python sources")
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--runs", type=int, default=2, help="seeds of each side's best learning rate")
    parser.add_argument("--precision", default="fp8", help="of our side; the speed that is claimed is that of fp8")
    args = parser.parse_args()
    text = args.text or f"{sysconfig.get_paths()['purelib']}/**/*.py"
    steps = args.tokens // (BATCH * CONTEXT)
    with tempfile.TemporaryDirectory(prefix="gptloom-bench-") as name:
        folder = Path(name)
        directory = make_shards(EXPERIMENT, text, folder)
        shards = ShardSet.open(directory)
        train_tokens, val = shards.tokens("train"), shards.tokens("val")
        sys.stderr.write(f"{len(train_tokens):,} training tokens, {len(val):,} for validation\n")
        peer = Peer(args.peer_dir, folder, "sources", train_tokens[:], val[: MAX_VAL_TOKENS + 1])

        cards = Cards()

        def theirs(rate: float, seed: int) -> float:
            settings = [
                "--dataset=sources", f"--max_iters={steps}", f"--lr_decay_iters={steps}", f"--warmup_iters={steps // 10}",
                f"--learning_rate={rate}", f"--min_lr={rate / 10}", "--batch_size=32", "--gradient_accumulation_steps=2",
                f"--eval_interval={steps}", "--eval_iters=20", "--always_save_checkpoint=True",
            ]  # fmt: skip
            with cards.lent() as card:
                script = peer.script_with_seed(seed)
                run = peer.train(f"peer-{rate}-{seed}", *settings, script=script, card=card)
                device = f"cuda:{visible_cards().index(card)}"
                loss = peer.evaluate(peer.load(run.checkpoint, device), device)
            sys.stderr.write(f"peer, learning rate {rate}, seed {seed}: {loss:.4f} in {run.seconds:.0f} s\n")
            return loss

        def ours(factor: float, seed: int) -> float:
            changes = [f"{field}={rate * factor}" for field, rate in OUR_RATES.items()]
            changes += [
                f"train.global_batch_size={BATCH}", f"train.max_tokens={steps * BATCH * CONTEXT}", f"train.precision={args.precision}",
                f"train.eval_tokens={MAX_VAL_TOKENS}", f"train.eval_interval={steps}", f"train.seed={seed}",
            ]  # fmt: skip
            with cards.lent() as card:
                out = folder / f"ours-{factor}-{seed}"
                run = train(EXPERIMENT, text, directory, out, *changes, shared_card=card)
            return float(run.result["val_loss"])

        with ThreadPoolExecutor(16) as pool:  # all of both sides wait for a card at once
            our_side = pool.submit(search, pool, ours, OUR_FACTORS, args.runs)
            peer_side = pool.submit(search, pool, theirs, PEER_RATES, args.runs)
            (our_losses, our_search), (peer_losses, peer_search) = our_side.result(), peer_side.result()
    found = figure(
        "validation loss after equal tokens", "nats per token", our_losses, peer=peer_losses, goal=1.0, of="ratio"
    )
    print_figures(
        [found],
        our_losses=our_losses,
        peer_losses=peer_losses,
        tokens=steps * BATCH * CONTEXT,
        our_search=our_search,
        peer_search=peer_search,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

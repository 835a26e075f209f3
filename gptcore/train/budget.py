"""Minutes → model size, batch and steps: a short calibration on the device that will train.

    python -m gptcore.train.budget experiments/shakespeare.yaml --shards DIR --out DIR --minutes 5

Sizes of a ladder are timed from the smallest up, a few steps each; the largest that still sees TOKENS_PER_PARAMETER tokens per
parameter in the time is taken (compute-optimal training: Hoffmann et al. 2022; the ratio is the one that was found best for
minutes on characters here, experiments/LOG.md). The calibration may take CALIBRATION_SHARE of the time.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from gptcore.config import ExperimentConfig, UserError, load_config, with_changes
from gptcore.entry import process_parser, run_process
from gptcore.evaluate import evaluate_loss
from gptcore.shards import ShardSet
from gptcore.store import write_json
from gptcore.train.step import train_step
from gptcore.train.trainer import build_trainer

log = logging.getLogger(__name__)

TOKENS_PER_PARAMETER = 2.5
CALIBRATION_SHARE = 0.08
TIMED_STEPS = 3
WARMING_TOKENS, TIMED_TOKENS = 1024, 8192  # of an evaluation
SIZES = (  # n_layer, n_head, n_embd, block_size
    (1, 2, 32, 32),
    (2, 2, 64, 64),
    (3, 3, 96, 96),
    (4, 4, 128, 128),
    (6, 6, 192, 128),
    (6, 8, 256, 256),
    (8, 8, 384, 256),
    (10, 8, 512, 512),
    (12, 12, 768, 512),
)


def main(argv: list[str]) -> dict[str, Any]:
    parser = process_parser(__doc__, "config", "experiment file (YAML)")
    parser.add_argument("--minutes", type=float, required=True, help="minutes of training")
    args = parser.parse_args(argv)
    if args.shards is None or args.out is None or args.minutes <= 0:
        raise UserError("a calibration needs --shards DIR, --out DIR and --minutes above 0")
    shards, start = ShardSet.open(args.shards), time.perf_counter()
    result = choose_size(load_config(args.config), shards, 60 * args.minutes)
    result["seconds"] = time.perf_counter() - start
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(Path(args.out) / "budget.json", result, has_checksum=False)
    return result


def choose_size(config: ExperimentConfig, shards: ShardSet, seconds: float) -> dict[str, Any]:
    """{"changes": sections to change, "tok_per_sec", "parameters", "steps", "tokens", "eval_seconds", "tried"} for so many seconds."""
    start = time.perf_counter()
    tried: list[dict[str, Any]] = []
    chosen: dict[str, Any] | None = None
    for size in SIZES:
        if min(shards.n_tokens.values()) <= size[3]:
            break
        measured = measure_size(config, shards, size)
        tokens = measured["tok_per_sec"] * seconds
        measured |= {"tokens": int(tokens), "steps": int(tokens / measured["tokens_per_step"])}
        tried.append(measured)
        parameters, rate = measured["parameters"], measured["tok_per_sec"]
        name = "x".join(map(str, size))
        log.info("%s: %d parameters, %.0f tok/s, %d tokens in the time", name, parameters, rate, tokens)
        if chosen is not None and tokens < TOKENS_PER_PARAMETER * parameters:
            break
        chosen = measured
        if time.perf_counter() - start > CALIBRATION_SHARE * seconds:
            break
    if chosen is None:
        fewest = min(shards.n_tokens.values())
        raise UserError(f"the text has {fewest} tokens on one side of its split, too few for the smallest model; give more")
    return {**chosen, "tried": [{k: v for k, v in t.items() if k != "changes"} for t in tried]}


def measure_size(config: ExperimentConfig, shards: ShardSet, size: tuple[int, int, int, int]) -> dict[str, Any]:
    """Speed of a few real steps, and of the evaluation, at one size."""
    n_layer, n_head, n_embd, block_size = size
    changes: dict[str, dict[str, Any]] = {
        "model": {"family": "gpt", "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size},
        "train": {"global_batch_size": 16 if n_embd < 256 else 32, "micro_batch_size": "auto"},
    }
    no_end = {"minutes": None, "max_tokens": None, "max_steps": 1_000_000, "init_from": None}
    trainer = build_trainer(with_changes(config, model=changes["model"], train=changes["train"] | no_end), shards)
    train_step(trainer)
    trainer.device.synchronize()
    start = time.perf_counter()
    for _ in range(TIMED_STEPS):
        train_step(trainer)
    trainer.device.synchronize()
    seconds = (time.perf_counter() - start) / TIMED_STEPS
    for tokens in (WARMING_TOKENS, TIMED_TOKENS):  # the first evaluation of a process is the slowest
        start = time.perf_counter()
        seen = evaluate_loss(trainer.model, shards, trainer.device, config.evaluate.batch_size, tokens).tokens
        eval_rate = seen / (time.perf_counter() - start)
    return {
        "changes": changes,
        "parameters": trainer.model.count_parameters(),
        "tokens_per_step": trainer.tokens_per_step,
        "tok_per_sec": trainer.tokens_per_step / seconds,
        "eval_seconds": shards.n_tokens["val"] / eval_rate,
    }


if __name__ == "__main__":
    raise SystemExit(run_process(main))

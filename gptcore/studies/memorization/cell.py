"""One cell of the memorization study: a training of so many passes over the text, and what its checkpoints recite of both splits.

Extractable memorization after Carlini et al. (2021, 2023): a prompt from the text, continued greedily, word for word.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gptcore.checkpoint import list_checkpoints, load_model
from gptcore.config import ExperimentConfig, UserError, with_changes
from gptcore.corpus import SPLITS
from gptcore.device import Device
from gptcore.evaluate import SplitView, evaluate_loss
from gptcore.models import LanguageModel
from gptcore.reciting import recite
from gptcore.resampling import ratio_interval
from gptcore.shards import ShardSet
from gptcore.studies import Bench, Cell, CellResult
from gptcore.studies.memorization.options import MemorizationOptions


def measure_cell(cell: Cell, bench: Bench) -> CellResult:
    """Train with checkpoints at several ages; bits per byte and recited prompts of each, in training and held-out text."""
    options: MemorizationOptions = cell.options
    config = lengthened(cell.config, options, len(bench.shards.tokens("train")))
    rows = []
    for path in list_checkpoints(bench.train(config).folder / "checkpoints"):
        model, checkpoint = load_model(path, bench.device.torch)
        step, tokens = checkpoint.state["step"], checkpoint.state["tokens_seen"]
        row = measure_age(model, config, options, bench.shards, bench.device)
        bench.journal.metrics({f"memorization/{k}": v for k, v in row.items() if is_curve(k)}, tokens_seen=tokens, step=step)
        passes = tokens / len(bench.shards.tokens("train"))
        asked = options.model_dump(include={"prompt_tokens", "recited_tokens"})
        rows.append({"step": step, "tokens_seen": tokens, "passes": passes, **asked, **row})
    last = rows[-1]
    metrics = {"val/bpb": last["val_bpb"]} | {f"memorization/{k}": v for k, v in last.items() if is_curve(k)}
    return CellResult(rows, metrics=metrics)


def is_curve(column: str) -> bool:
    """Whether a column is to be seen over a training."""
    return column.endswith(("_recited", "_in_runs"))


def lengthened(config: ExperimentConfig, options: MemorizationOptions, text_tokens: int) -> ExperimentConfig:
    """The arm's experiment with the passes of its options as its length, and every age kept. Raises UserError."""
    window, asked = config.model.block_size + 1, options.prompt_tokens + options.recited_tokens
    if asked > window:
        raise UserError(
            f"options.prompt_tokens={options.prompt_tokens} and options.recited_tokens={options.recited_tokens} are {asked} tokens, "
            f"more than model.block_size + 1 = {window}; lower them"
        )
    steps = max(options.ages, round(options.passes * text_tokens / (config.train.global_batch_size * config.model.block_size)))
    changes: dict[str, Any] = {"max_steps": steps, "max_tokens": None, "minutes": None}
    changes |= {"warmup_steps": min(config.train.warmup_steps, steps), "patience": 0}
    changes |= {"save_interval": math.ceil(steps / options.ages), "keep_checkpoints": options.ages}
    return with_changes(config, train=changes)


def measure_age(
    model: LanguageModel, config: ExperimentConfig, options: MemorizationOptions, shards: ShardSet, device: Device
) -> dict[str, Any]:
    """A checkpoint's numbers, those of training text named train_…, those of held-out text val_…; shares with intervals over prompts."""
    n_tokens = min(options.eval_tokens, *(len(shards.tokens(split)) - 1 for split in SPLITS))
    row: dict[str, Any] = {}
    for split in SPLITS:
        view = SplitView(shards, split, n_tokens + 1)
        recital = recite(model, shards, split, device, options.prompts)
        is_recited = recital.is_continued(options.prompt_tokens, options.recited_tokens)
        row[f"{split}_bpb"] = evaluate_loss(model, view, device, config.evaluate.batch_size, n_tokens).bpb
        row |= recited_share(is_recited, recital.starts, shards.index(split), config, f"{split}_recited")
        row[f"{split}_in_runs"] = recital.share
    return row


def recited_share(
    is_recited: np.ndarray, starts: np.ndarray, index: np.ndarray, config: ExperimentConfig, name: str
) -> dict[str, Any]:
    """Share of prompts, and its 95 % interval over documents (or sections) drawn anew; a prompt is of the record it starts in."""
    records = np.searchsorted(index[:, 0], starts, side="right") - 1
    numbers, record = np.unique(records, return_inverse=True)  # records without a prompt say nothing
    recited, prompts = np.bincount(record, is_recited), np.bincount(record)
    settings = config.evaluate
    interval = ratio_interval(recited, prompts, index[numbers, 1], settings.bootstrap, settings.seed)
    share = {name: float(is_recited.mean())}
    return share if interval is None else share | {f"{name}_low": interval[0], f"{name}_high": interval[1]}

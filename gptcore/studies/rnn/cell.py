"""One cell of the RNN study: a family at the reference's number of non-embedding parameters, its learning rate searched, then measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptcore.checkpoint import load_model
from gptcore.config import ExperimentConfig, ModelConfig, UserError, with_changes
from gptcore.device import Device
from gptcore.evaluate import evaluate_loss
from gptcore.models import LanguageModel, build_model
from gptcore.models.build import MODELS
from gptcore.models.ngram import NGram
from gptcore.models.rnn import Recurrent, RecurrentState
from gptcore.studies import Bench, Cell, CellResult
from gptcore.studies.rnn.carried import stream_bpb, train_carried
from gptcore.studies.rnn.options import RnnOptions
from gptcore.studies.sizes import nearest_width
from gptcore.studies.speed import measure_decoding

RECURRENT = [name for name, kind in MODELS.items() if issubclass(kind, Recurrent)]
TABLES = ("wte", "wpe", "lm_head")  # what "non-embedding" leaves out
SEARCH_SEED = 0  # not one of the study's, so that no result is the best of several tries


def measure_cell(cell: Cell, bench: Bench) -> CellResult:
    """Search, train, evaluate; curves, loss by position, memory of decoding."""
    options: RnnOptions = cell.options
    config = sized(cell.config, options, bench.shards.vocab_size)
    if options.family == "ngram":
        return measure_ngram(config, options, bench)
    if options.carried and options.family not in RECURRENT:
        raise UserError(f"options.carried=true: {options.family} has no recurrent state; use {', '.join(RECURRENT)}")
    search = try_rates(config, options, bench)
    lr = min(search, key=lambda row: row["val_bpb"])["lr"] if search else config.train.lr
    config = with_changes(config, train={"lr": lr})
    curve: list[dict[str, Any]] = []
    row: dict[str, Any] = {"family": options.family, "state": "carried" if options.carried else "reset", "lr": lr}
    if options.carried:
        model = train_carried(config, bench.shards, bench.stop)
    else:
        trained = bench.train(config)
        model, _ = load_model(trained.checkpoint, bench.device.torch)
        cost = model.flops_per_token()
        curve = [
            {"tokens": tokens, "seconds": seconds, "flops": tokens * cost, "val_bpb": bpb}
            for tokens, seconds, bpb in trained.curve()
        ]
        row |= {"tokens": curve[-1]["tokens"], "train_seconds": curve[-1]["seconds"], "train_flops": curve[-1]["flops"]}
        row["train_tok_per_sec"] = row["tokens"] / row["train_seconds"]
    more, tables = describe(model, config, options, bench)
    row |= more
    return CellResult([row], {"search": search, "curves": curve, **tables}, {"val/bpb": row["val_bpb"]})


def describe(
    model: LanguageModel, config: ExperimentConfig, options: RnnOptions, bench: Bench
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """What is measured of any trained model, whatever its family."""
    device = bench.device
    evaluation = evaluate_loss(model, bench.shards, device, config.evaluate.batch_size)
    row: dict[str, Any] = {
        "parameters": model.count_parameters(),
        "non_embedding": count_non_embedding(model),
        "flops_per_token": model.flops_per_token(),
        "val_bpb": evaluation.bpb,
    }
    if options.family in RECURRENT:
        row["stream_reset_bpb"] = stream_bpb(model, bench.shards, device, is_carried=False)
        row["stream_carried_bpb"] = stream_bpb(model, bench.shards, device, is_carried=True)
    for batch in options.batches:
        timed = measure_decoding(model, device, batch, options.decode_tokens, options.repeats)
        row[f"decode_{batch}"] = 1e3 * batch * min(options.decode_tokens, model.block_size) / timed.median
    positions = [{"position": i, "nats": float(nats)} for i, nats in enumerate(evaluation.position_nats)]
    memory = []
    if options.family != "ngram":
        memory = [
            {"context": n, "state_kib": state_bytes(config.model, bench.shards.vocab_size, n, device) / 2**10}
            for n in options.contexts
        ]
    return row, {"positions": positions, "memory": memory}


def measure_ngram(config: ExperimentConfig, options: RnnOptions, bench: Bench) -> CellResult:
    """Counts have no curve: one pass over the training split is all."""
    model = build_model(config.model, bench.shards.vocab_size).to(bench.device.torch)
    assert isinstance(model, NGram)
    model.fit(bench.shards.tokens("train")[0 : len(bench.shards.tokens("train"))])
    row, tables = describe(model.eval(), config, options, bench)
    row = {"family": "ngram", "state": "reset", "lr": None, **row}
    return CellResult([row], tables, {"val/bpb": row["val_bpb"]})


def try_rates(config: ExperimentConfig, options: RnnOptions, bench: Bench) -> list[dict[str, Any]]:
    """Bits per byte of a short training for each learning rate, with reset state; one search a family, shared by its seeds."""
    rows = []
    for lr in options.lrs:
        steps = max(1, options.search_tokens // (config.train.global_batch_size * config.model.block_size))
        changes = {"lr": lr, "seed": SEARCH_SEED, "max_steps": steps, "max_tokens": None, "minutes": None}
        changes["warmup_steps"] = min(config.train.warmup_steps, steps)
        trained = bench.train(with_changes(config, train=changes))
        rows.append({"lr": lr, "val_bpb": trained.result["val_bpb"]})
    return rows


# --- sizes -----------------------------------------------------------------------------------------------------------------


def count_non_embedding(model: LanguageModel) -> int:
    """Parameters outside of look-up tables and head."""
    return sum(p.numel() for name, p in model.named_parameters() if not any(part in TABLES for part in name.split(".")))


def sized(config: ExperimentConfig, options: RnnOptions, vocab_size: int) -> ExperimentConfig:
    """The arm's experiment: its family at the width whose non-embedding parameters are nearest to the reference's."""
    if options.family == "gpt":
        return config
    model = {"family": options.family, "n_layer": options.n_layer or config.model.n_layer}
    changed = with_changes(config, model=model, train={"optimizer": "adamw"})
    if options.family not in RECURRENT:
        return with_changes(changed, train={"weight_decay": 0.0})
    width = nearest_width(
        lambda n_embd: _non_embedding(changed.model.model_copy(update={"n_embd": n_embd}), vocab_size),
        _non_embedding(config.model, vocab_size),
    )
    return with_changes(changed, model={"n_embd": width})


def _non_embedding(config: ModelConfig, vocab_size: int) -> int:
    with torch.device("meta"):
        return count_non_embedding(build_model(config, vocab_size))


@torch.inference_mode()
def state_bytes(config: ModelConfig, vocab_size: int, context: int, device: Device) -> int:
    """Bytes of what a model remembers of `context` tokens while it generates, from the tensors themselves."""
    model = build_model(config.model_copy(update={"block_size": context}), vocab_size).to(device.torch).eval()
    cache = model.new_cache(1)
    model(torch.zeros(1, context, dtype=torch.int64, device=device.torch), cache=cache)
    if isinstance(cache, RecurrentState):
        return sum(tensor.nbytes for tensor in _tensors(cache.value))
    return 0 if cache is None else sum(tensor.nbytes for tensor in [*cache.keys, *cache.values])


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in _tensors(part)]

"""Checkpoints of a run: what is written, and how a run goes on from one."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch

from gptcore.checkpoint import list_checkpoints, load_checkpoint, load_optimizer_tensors, save_checkpoint
from gptcore.config import UserError
from gptcore.train.trainer import Trainer

log = logging.getLogger(__name__)

TRAINING_WEIGHTS = "weights/"  # beside the optimizer's tensors, where the model file holds the moving average


def save(trainer: Trainer, folder: Path, keep: int, progress: dict[str, Any]) -> Path:
    """Commit a checkpoint below `folder`; its model is the moving average where there is one. Absolute path, on all processes.

    `progress` is the loop's memory, handed back by `resume`.
    """
    directory = (folder / f"step_{trainer.step:06d}").resolve()
    seconds = trainer.elapsed_seconds()
    if trainer.ranks.is_first:
        with trainer.clock.phase("save"), averaged(trainer) as weights:
            tensors = trainer.optimizers.state_tensors() | {TRAINING_WEIGHTS + n: t for n, t in weights.items()}
            if trainer.loss_scale is not None:
                tensors["loss_scale"] = trainer.loss_scale.scale
            state = {
                "tokens_seen": trainer.tokens_seen,
                "seconds": seconds,
                "vocab_size": trainer.shards.vocab_size,
                "vocab_fingerprint": trainer.shards.fingerprint,
                "shards_id": trainer.shards.id,
                "micro_batch_size": trainer.micro_batch_size,
                "rng": {"cpu": torch.get_rng_state().tolist()}
                | ({"cuda": torch.cuda.get_rng_state().tolist()} if trainer.device.is_cuda else {}),
                "progress": progress,
            }
            tokenizer = trainer.shards.directory / "tokenizer.json"
            save_checkpoint(folder, trainer.step, trainer.model, tensors, state, trainer.config, tokenizer, keep)
    trainer.ranks.wait()
    return directory


def resume(trainer: Trainer, out: Path) -> dict[str, Any]:
    """Continue from the newest checkpoint of this run, if there is one for the same config and shards; the loop's memory in it."""
    checkpoints = list_checkpoints(out / "checkpoints")
    if not checkpoints:
        return {}
    checkpoint = load_checkpoint(checkpoints[-1])
    if checkpoint.config.model_dump(exclude={"name"}) != trainer.config.model_dump(exclude={"name"}):
        raise UserError(
            f"{out}: holds checkpoints of another config; give another --out, or delete {out / 'checkpoints'}"
        )
    state = checkpoint.state
    if state["shards_id"] != trainer.shards.id:
        raise UserError(
            f"{out}: its checkpoints were trained on shard set {state['shards_id']}, not {trainer.shards.id}; give another --out"
        )
    tensors = load_optimizer_tensors(checkpoints[-1])
    trainer.model.load_weights(checkpoint.model)
    if trainer.average is not None:
        for name, average in trainer.average.average.items():
            average.copy_(checkpoint.model[name])
        trainer.model.load_weights({name: tensors.pop(TRAINING_WEIGHTS + name) for name in checkpoint.model})
    if trainer.loss_scale is not None:
        trainer.loss_scale.scale.copy_(tensors.pop("loss_scale"))
    trainer.optimizers.load_state_tensors(tensors)
    trainer.step = trainer.watch.checked = state["step"]
    trainer.micro_batch_size = state["micro_batch_size"]
    trainer.seconds_before = state["seconds"]
    if trainer.ranks.is_first:
        torch.set_rng_state(torch.tensor(state["rng"]["cpu"], dtype=torch.uint8))
        if trainer.device.is_cuda and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(torch.tensor(state["rng"]["cuda"], dtype=torch.uint8))
    else:
        torch.manual_seed(trainer.config.train.seed + trainer.ranks.rank + trainer.step)
    log.info("resumed at step %d from %s", trainer.step, checkpoints[-1])
    return state["progress"]


def averaged(trainer: Trainer) -> contextlib.AbstractContextManager[dict[str, torch.Tensor]]:
    """Inside, the model holds what is evaluated and saved: the moving average, or its own weights."""
    return contextlib.nullcontext({}) if trainer.average is None else trainer.average.applied()

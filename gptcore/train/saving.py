"""Checkpoints of a run: what is written, and how a run goes on from one."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcore.checkpoint import (
    MODEL,
    OPTIMIZER,
    Snapshot,
    check_checkpoint,
    checkpoint_path,
    copy_tensors,
    list_checkpoints,
    newest_whole,
    read_state,
    read_tensors,
    step_directories,
    step_of,
)
from gptcore.config import ExperimentConfig, UserError, differences, load_written
from gptcore.leftovers import sweep
from gptcore.ranks import fill
from gptcore.shards import ShardSet
from gptcore.store import is_committed, verify_file
from gptcore.train.trainer import Trainer
from gptcore.train.writer import CheckpointWriter, copy_to_host

log = logging.getLogger(__name__)

# Beside the optimizer's own tensors, in the same file:
TRAINING_WEIGHTS = "weights/"  # where the model file holds the moving average
LOSS_SCALE, LOSS_SCALE_GROWTH = "loss_scale", "loss_scale_growth"
LOSSES = "losses"  # of the steps since the last report: the next one is the mean over all of its steps

Memory = dict[str, Any]  # the loop's, JSON-able but for `losses`, a list of scalars


def checkpoints_of(out: Path) -> Path:
    return out / "checkpoints"


def save(trainer: Trainer, writer: CheckpointWriter, memory: Memory, best_step: int | None) -> None:
    """Have a checkpoint of this step written; its model is the moving average where there is one. All processes call it.

    memory: `resume` hands it back. best_step: the step whose checkpoint must stay, too.
    """
    began = time.perf_counter()
    seconds = trainer.elapsed_seconds()
    # These ask all processes, so all of them have to come by here, the ones without a file too.
    rng = random_states(trainer)
    losses = trainer.ranks.sum_(torch.stack(memory["losses"])) if memory["losses"] else None
    if not (trainer.ranks.is_first or trainer.is_spread):
        return
    with trainer.clock.phase("save"):
        # Two snapshots in memory would be one too many.
        writer.wait()
        weights = trainer.model.weights()
        # The model file is what is used later: the average, where there is one. What the run goes on with lies beside the
        # optimizer.
        model = weights if trainer.average is None else trainer.average.weights()
        tensors = trainer.optimizers.state_tensors()
        if trainer.average is not None:
            tensors |= {TRAINING_WEIGHTS + name: tensor for name, tensor in weights.items()}
        if trainer.loss_scale is not None:
            tensors |= {LOSS_SCALE: trainer.loss_scale.scale, LOSS_SCALE_GROWTH: trainer.loss_scale.growth}
        if losses is not None:
            tensors[LOSSES] = losses
        # Moments of the optimizer belong to exactly these weights, so all is copied between the same two steps.
        # No name is in both: the optimizer's have a slash, or are the words above.
        copies, wait_for_copies = copy_to_host(model | tensors, is_kept=trainer.ranks.is_first)
        if not trainer.ranks.is_first:
            return
        # The rest of the run follows from the config and the step: order of samples and schedule are functions of it. Not so
        # the random state, where dropout is, the clock of earlier attempts, the micro-batch that was found to fit, and what the
        # loop remembers.
        state = {
            "tokens_seen": trainer.tokens_seen,
            "seconds": seconds,
            "vocab_size": trainer.shards.vocab_size,
            "vocab_fingerprint": trainer.shards.fingerprint,
            "shards_id": trainer.shards.id,
            "micro_batch_size": trainer.micro_batch_size,
            "rng": rng,
            "best_step": best_step,
            "memory": {key: value for key, value in memory.items() if key != "losses"},
        }
        snapshot = Snapshot(
            trainer.step,
            {name: copies[name] for name in model},
            {name: copies[name] for name in tensors},
            state,
            trainer.config,
            trainer.shards.directory / "tokenizer.json",
        )
        writer.submit(snapshot, wait_for_copies, began)


def resume(trainer: Trainer, out: Path) -> Memory:
    """Continue from the newest whole checkpoint of this run, if there is one; the loop's memory in it, else {}.

    Works with another number of processes, spread or not, and another micro-batch than before. Tensors are read one by one into their places.
    Raises UserError when the checkpoint is of another config or other shards, OSError when it cannot be read.
    """
    step = int(trainer.ranks.from_first(float(_choose(out) if trainer.ranks.is_first else 0)))
    if step < 0:
        return {}
    directory = checkpoint_path(checkpoints_of(out), step)
    check_checkpoint(directory)  # each process what it reads itself; the first has just done so
    state = read_state(directory)
    # Going on with another config would be a run that no config describes.
    _check_same(load_written(directory / "config.yaml"), state, trainer.config, trainer.shards, out)
    memory = {**state["memory"], "losses": _load_tensors(trainer, directory)}
    # From here on sampler, schedule and progress are where they were.
    trainer.step = trainer.watch.checked = state["step"]
    trainer.seconds_before = state["seconds"]
    # Another cut of the batch adds up in another order, and the last digits would differ from those of a run that was never
    # stopped.
    if trainer.config.train.micro_batch_size == "auto" and trainer.local_batch_size % state["micro_batch_size"] == 0:
        trainer.micro_batch_size = state["micro_batch_size"]
    _set_random_state(trainer, state["rng"])
    log.info("resumed at step %d from %s", trainer.step, directory)
    return memory


def check_out(out: Path, config: ExperimentConfig, shards: ShardSet) -> None:
    """Raises UserError when `out` holds checkpoints of another config or other shards, before anything is written there."""
    for directory in reversed(list_checkpoints(checkpoints_of(out))):
        try:
            verify_file(directory / "config.yaml")
            before, state = load_written(directory / "config.yaml"), read_state(directory)
        except UserError:  # damaged, as `resume` will say
            continue
        _check_same(before, state, config, shards, out)
        return


def _check_same(before: ExperimentConfig, state: dict[str, Any], config: ExperimentConfig, shards: ShardSet, out: Path) -> None:
    if differing := differences(before, config):
        raise UserError(
            f"{out}: holds checkpoints of another config ({'; '.join(differing[:3])}); give another --out, or delete "
            f"{checkpoints_of(out)}"
        )
    if state["shards_id"] != shards.id:
        raise UserError(
            f"{out}: its checkpoints were trained on shard set {state['shards_id']}, not {shards.id}; give another --out"
        )


def _choose(out: Path) -> int:
    """The step to go on from, -1 for none; torn leftovers are deleted, damaged checkpoints put aside, and both are said.

    Raises OSError, with all as it was, where a checkpoint cannot be read.
    """
    folder = checkpoints_of(out)
    for torn in sweep(folder, new_s=0.0):
        log.info("deleted %s, which a killed process left unfinished", torn)
    # A machine that died may have left a file of zeros under a good name, so every byte is read before it is believed.
    whole, skipped = newest_whole(folder)
    for reason in skipped:
        log.warning("checkpoint skipped: %s", reason)
    newer = [path for path in step_directories(folder) if whole is None or step_of(path) > step_of(whole)]
    for directory in newer:
        if is_committed(directory):
            shutil.rmtree(directory.with_name(f"damaged_{directory.name}"), ignore_errors=True)
            # Put aside, not deleted: it may be all that is left of a week.
            directory.rename(directory.with_name(f"damaged_{directory.name}"))
        else:
            shutil.rmtree(directory)
    if skipped and whole is None:
        log.warning("no whole checkpoint is left in %s: starting from step 0", folder)
    return -1 if whole is None else step_of(whole)


@torch.no_grad()
def _load_tensors(trainer: Trainer, directory: Path) -> list[Tensor]:
    """Weights, average, optimizer and loss scale into their places; returns the losses that no report has told of yet."""
    weights = trainer.model.weights()
    copy_tensors(directory / MODEL, weights if trainer.average is None else trainer.average.weights())
    losses: list[Tensor] = []
    # One by one: twice the model and its moments at once might not fit.
    for name, tensor in read_tensors(directory / OPTIMIZER):
        if name.startswith(TRAINING_WEIGHTS):
            fill(weights[name.removeprefix(TRAINING_WEIGHTS)], tensor)
        elif name == LOSSES:  # the sum over processes, which the next report makes again
            share = tensor if trainer.ranks.is_first else torch.zeros_like(tensor)
            losses = list(share.to(trainer.device.torch).unbind())
        elif name in (LOSS_SCALE, LOSS_SCALE_GROWTH):
            assert trainer.loss_scale is not None, name
            (trainer.loss_scale.scale if name == LOSS_SCALE else trainer.loss_scale.growth).copy_(tensor)
        else:
            trainer.optimizers.load_state_tensors({name: tensor})
    return losses


def random_states(trainer: Trainer) -> list[dict[str, str]]:
    """The generators of every process, in hexadecimal: dropout goes on where it was."""
    states = {"cpu": torch.get_rng_state()}
    if trainer.device.is_cuda:
        states["cuda"] = torch.cuda.get_rng_state()
    gathered = {key: trainer.ranks.gather(state) for key, state in states.items()}
    return [
        {key: bytes(states[rank].tolist()).hex() for key, states in gathered.items()} for rank in range(trainer.ranks.count)
    ]


def _set_random_state(trainer: Trainer, states: list[dict[str, str]]) -> None:
    """This process's generators; one that was not there before draws numbers of its own."""
    rank = trainer.ranks.rank
    if rank >= len(states):
        # Not the seed alone: its masks are those of step 0, once more.
        torch.manual_seed(trainer.config.train.seed + rank + trainer.step)
        return
    restored = {key: torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8) for key, text in states[rank].items()}
    torch.set_rng_state(restored["cpu"])
    if trainer.device.is_cuda and "cuda" in restored:
        torch.cuda.set_rng_state(restored["cuda"])


def averaged(trainer: Trainer) -> contextlib.AbstractContextManager[Any]:
    """Inside, the model holds what is evaluated and saved: the moving average, or its own weights."""
    return contextlib.nullcontext() if trainer.average is None else trainer.average.applied()

"""One training from its config to its result: what the process does around the loop."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch

from gptcore.config import ExperimentConfig, TrainConfig, UserError, flatten, write_yaml
from gptcore.device import naming_refusals, reserve_device
from gptcore.entry import StopFlag, recording
from gptcore.journal import NoJournal
from gptcore.ranks import Ranks
from gptcore.shards import ShardSet
from gptcore.store import MANIFEST, hash_file
from gptcore.train.gradient_check import FILE_NAME as GRADIENT_CHECK
from gptcore.train.gradient_check import write_gradient_check
from gptcore.train.loop import train_loop
from gptcore.train.preflight import preflight
from gptcore.train.saving import check_out, resume
from gptcore.train.trainer import build_trainer

log = logging.getLogger(__name__)


def check_processes(train: TrainConfig) -> None:
    """Raises UserError for more processes than this machine has GPUs; on a CPU they share it."""
    gpus = torch.cuda.device_count() if train.device != "cpu" and torch.cuda.is_available() else train.processes
    if train.processes > gpus:
        raise UserError(
            f"train.processes={train.processes}: this machine has {gpus} GPU(s), and each process needs its own; use "
            f"train.processes={gpus}, or train.device=cpu"
        )


def run_training(
    config: ExperimentConfig, shards: ShardSet, out: Path, ranks: Ranks, name: str | None, parent: str | None
) -> dict[str, Any]:
    """One training, from an empty or a half-finished `out` to its result. SIGTERM or SIGINT: see `StopFlag`."""
    check_out(out, config, shards)
    stop = StopFlag()
    stop.install()
    with contextlib.ExitStack() as stack:
        setting_up = stack.enter_context(contextlib.ExitStack())
        setting_up.enter_context(stop.interrupting())
        verification = stack.enter_context(shards.verified_behind())
        trainer = build_trainer(config, shards, ranks)
        device = trainer.device
        journal = stack.enter_context(recording(out, name, parent)) if ranks.is_first else NoJournal()
        stack.enter_context(verification.explaining())
        stack.enter_context(naming_refusals())
        for turn in range(ranks.count):  # one after the other: two trainings must not hold half of the GPUs each
            if turn == ranks.rank:
                stack.enter_context(reserve_device(device))
            ranks.wait()
        stack.enter_context(device.attention(config.model.dropout))
        if ranks.is_first:
            write_yaml(config, out / "config.yaml")
        memory = resume(trainer, out)
        verification.since = trainer.step
        journal.tags(device.tags())
        facts = {"device": device.name, "precision": device.precision, "shards": shards.id, "ranks": ranks.count}
        journal.params(flatten(config) | {"parameters": trainer.model.count_parameters()} | facts)
        recipe = config.model.preset if config.model.family == "gpt" else config.train.optimizer
        processes = f", {ranks.count} processes" if ranks.count > 1 else ""
        what = f"{config.model.family} ({recipe}) on {device.name} in {device.precision}{processes}"
        micro_steps = trainer.local_batch_size // trainer.micro_batch_size
        log.info("%s; %s tokens a step, %d micro-step(s)", what, f"{trainer.tokens_per_step:,}", micro_steps)
        log.info("%s", preflight(trainer).line(device.name))
        check = write_gradient_check(trainer, out)
        if check:
            journal.artifact(GRADIENT_CHECK)
        setting_up.close()
        result = train_loop(trainer, journal, out, stop, memory)
        if check:  # late, because MLflow's compare page shows the metric that came first
            journal.metrics({"train/accumulation_error": check["error"]}, tokens_seen=0)
        journal.artifact("config.yaml")
        # The files stay where they are; MLflow is told where that is, and by the manifest what every one of them must hash to.
        manifest = Path(result["checkpoint"]) / MANIFEST
        journal.tags({"gptloom.checkpoint": result["checkpoint"], "gptloom.checkpoint.sha256": hash_file(manifest)})
        journal.artifact(manifest, folder="checkpoint")
    return result

"""The trainer as a process: see `gptcore.train`. A run that was stopped goes on from its newest checkpoint.

    python -m gptcore.train experiments/smoke.yaml [section.field=value …]

Without --shards it first makes them from `data.source`, which also takes pyarrow (and finds them again the next time).
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

import torch

from gptcore.config import ExperimentConfig, TrainConfig, UserError, dump_yaml, flatten, load_config
from gptcore.device import naming_refusals, reserve_device
from gptcore.entry import StopFlag, process_parser, recording, run_process
from gptcore.journal import NoJournal
from gptcore.launch import launch
from gptcore.ranks import Ranks, joined_ranks
from gptcore.shards import ShardSet, prepare
from gptcore.store import MANIFEST, content_id, hash_file, home_dir, read_manifest
from gptcore.train import build_trainer, preflight, resume, train_loop
from gptcore.train.gradient_check import FILE_NAME as GRADIENT_CHECK
from gptcore.train.gradient_check import write_gradient_check
from gptcore.train.saving import check_out

log = logging.getLogger(__name__)

SPLITS = ("train", "val")
VERIFIED_BYTES = 1 << 30  # up to here the shards are hashed before they are trained on: about two seconds


def default_out(config: ExperimentConfig) -> Path:
    """One directory a config: the same call finds its own checkpoints again."""
    return home_dir() / "runs" / f"{config.name}-{content_id(config.model_dump(mode='json'))[:8]}" / "train"


def open_shards(directory: Path) -> ShardSet:
    """A shard set whose every byte is what its manifest says (sizes only, where it is large). Raises UserError."""
    shards = ShardSet.open(directory)
    if sum(shards.tokens(split).dtype.itemsize * shards.n_tokens[split] for split in SPLITS) <= VERIFIED_BYTES:
        for part in (directory, *shards.token_dirs):
            read_manifest(part, verify=True)
    return shards


def check_processes(train: TrainConfig) -> None:
    """Raises UserError for more processes than this machine has GPUs; on a CPU they share it."""
    gpus = torch.cuda.device_count() if train.device != "cpu" and torch.cuda.is_available() else train.processes
    if train.processes > gpus:
        raise UserError(
            f"train.processes={train.processes}: this machine has {gpus} GPU(s), and each process needs its own; use "
            f"train.processes={gpus}, or train.device=cpu"
        )


def main(argv: list[str]) -> dict[str, Any]:
    parser = process_parser(__doc__, "config", "experiment file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the experiment file")
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.overrides)
    if config.train.processes > 1 and "WORLD_SIZE" not in os.environ:
        check_processes(config.train)
        raise SystemExit(launch("gptcore.train", argv, config.train.processes))
    with joined_ranks() as ranks:
        if not ranks.is_first:
            logging.getLogger().setLevel(logging.WARNING)
        elif args.shards is None:
            args.shards = prepare(config, home_dir()).shards
        ranks.wait()
        shards = open_shards(args.shards or prepare(config, home_dir()).shards)
        out: Path = args.out or default_out(config)
        return {"run": args.run or out.resolve().name, **run(config, shards, out, ranks, args.run, args.parent)}


def run(
    config: ExperimentConfig, shards: ShardSet, out: Path, ranks: Ranks, name: str | None, parent: str | None
) -> dict[str, Any]:
    """One training, from an empty or a half-finished `out` to its result. SIGTERM or SIGINT: see `StopFlag`."""
    check_out(out, config, shards)
    stop = StopFlag()
    stop.install()
    with contextlib.ExitStack() as stack:
        setting_up = stack.enter_context(contextlib.ExitStack())
        setting_up.enter_context(stop.interrupting())
        trainer = build_trainer(config, shards, ranks)
        device = trainer.device
        journal = stack.enter_context(recording(out, name, parent)) if ranks.is_first else NoJournal()
        stack.enter_context(naming_refusals())
        for turn in range(ranks.count):  # one after the other: two trainings must not hold half of the GPUs each
            if turn == ranks.rank:
                stack.enter_context(reserve_device(device))
            ranks.wait()
        stack.enter_context(device.attention(config.model.dropout))
        if ranks.is_first:
            (out / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
        memory = resume(trainer, out)
        journal.tags(device.tags())
        facts = {
            "parameters": trainer.model.count_parameters(),
            "device": device.name,
            "precision": device.precision,
            "shards": shards.id,
            "ranks": ranks.count,
        }
        journal.params(flatten(config) | facts)
        log.info(
            "%s (%s) on %s in %s%s; %s tokens a step, %d micro-step(s)",
            config.model.family,
            config.model.preset if config.model.family == "gpt" else config.train.optimizer,
            device.name,
            device.precision,
            f", {ranks.count} processes" if ranks.count > 1 else "",
            f"{trainer.tokens_per_step:,}",
            trainer.local_batch_size // trainer.micro_batch_size,
        )
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


if __name__ == "__main__":
    raise SystemExit(run_process(main))

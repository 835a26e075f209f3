"""One of several processes that train a toy in every way there is, and tell what came of it. A module for tests/test_ranks.py.

torchrun --nproc-per-node=2 tests/ranks_process.py CONFIG.yaml --shards DIR --out DIR
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch

from gptcore.config import ExperimentConfig, load_config, with_changes
from gptcore.entry import StopFlag
from gptcore.journal import NoJournal
from gptcore.optim import muon
from gptcore.ranks import Ranks, joined_ranks
from gptcore.shards import ShardSet
from gptcore.train import Trainer, build_trainer, preflight, resume, train_step
from gptcore.train.gradient_check import check_gradient
from gptcore.train.loop import evaluate
from gptcore.train.preflight import measure_sequence_mib
from gptcore.train.saving import save
from gptcore.train.step import next_batch
from gptcore.train.writer import CheckpointWriter

HALF, STEPS = 3, 6


def train(config: ExperimentConfig, shards: ShardSet, out: Path, ranks: Ranks) -> dict[str, Any]:
    """From wherever `out` is to STEPS, with a checkpoint at HALF and at the end."""
    trainer = build_trainer(config, shards, ranks)
    memory, began = resume(trainer, out), trainer.step
    sequence = measure_sequence_mib(trainer, *[tensor[:1] for tensor in next_batch(trainer)])
    preflight(trainer)
    check = check_gradient(trainer)
    writer = CheckpointWriter(out / "checkpoints", 9, 0, lambda written: None)
    losses: list[float] = []
    norms: list[float] = []
    made = count_orthogonalized()
    while trainer.step < STEPS:
        loss, norm, _ = train_step(trainer)
        losses.append(ranks.sum_(loss.clone()).item())
        norms.append(norm.item())
        if trainer.step in (HALF, STEPS):
            save(trainer, writer, {"losses": [loss]}, None)
            writer.wait()
    ranks.wait()
    return {
        "began": began,
        "losses": losses,
        "norms": norms,
        "sequence_mib": sequence,
        "gradient_check": None if check is None else check["error"],
        "orthogonalized": ranks.sum_(torch.tensor(sum(made))).item(),
        "untold": [tensor.item() for tensor in memory.get("losses", [])],
        "val": evaluate(trainer, NoJournal(), 2048, StopFlag()).loss,
        "after": one_more(trainer, ranks),
    }


def one_more(trainer: Trainer, ranks: Ranks) -> float:
    """The loss of a step after an evaluation: of the weights, not of the average that was evaluated."""
    return ranks.sum_(train_step(trainer)[0]).item()


def count_orthogonalized() -> list[int]:
    """A list that grows by the number of matrices with every call."""
    made: list[int] = []
    real = getattr(muon.orthogonalize, "real", muon.orthogonalize)

    def counting(matrices: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        made.append(matrices.shape[:-2].numel())
        result: torch.Tensor = real(matrices, **kwargs)
        return result

    counting.real = real  # type: ignore[attr-defined]
    muon.orthogonalize = counting
    return made


def main() -> int:
    parser = ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="NAME/parallel of each training is a directory in it")
    parser.add_argument("--trainings", nargs="+", required=True, metavar="NAME:PARALLEL")
    args = parser.parse_args()
    with joined_ranks() as ranks:
        for training in args.trainings:
            name, _, parallel = training.partition(":")
            config = with_changes(load_config(args.config), train={"parallel": parallel})
            told = train(config, ShardSet.open(args.shards), args.out / name, ranks)
            if ranks.is_first:
                sys.stdout.write(json.dumps({"name": name, **told}) + "\n")
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Trainings at equal tokens, among them small batches with a rescaled beta2: does accumulation learn better?"""

from __future__ import annotations

from typing import Any

from gptcore.config import with_changes
from gptcore.studies import Bench, Cell, CellResult


def measure_learning(cell: Cell, bench: Bench) -> CellResult:
    """One training for each learning rate of the options: its loss at the end, and its curve over tokens and over seconds."""
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    train = cell.config.train
    for lr in cell.options.lrs:
        trained = bench.train(with_changes(cell.config, train={"lr": lr}))
        points = trained.curve("val/bpb")
        front = {"kind": "learning", "lr": lr}
        rows.append(
            {
                **front,
                "global_batch_size": train.global_batch_size,
                "beta2": train.beta2,
                "val_bpb": trained.result["val_bpb"],
                "val_loss": trained.result["val_loss"],
                "tokens": trained.result["tokens_seen"],
                "train_seconds": points[-1][1],
            }
        )
        curves += [{**front, "tokens": t, "seconds": s, "val_bpb": value} for t, s, value in points]
    best = min(rows, key=lambda row: row["val_bpb"])
    metrics = {"accumulation/val_bpb": best["val_bpb"], "accumulation/lr": best["lr"]}
    return CellResult(rows, {"curves": curves}, metrics)

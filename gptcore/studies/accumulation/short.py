"""One batch in 1 and in several micro-steps: are the gradients the same, what does it save, what does it cost?

    gptloom study accumulation                                                              # the study
    python -m gptcore.studies.accumulation CONFIG.yaml --shards DIR --out DIR --checkpoint DIR   # its short form in a pipeline run

The study's cells are of three kinds: exactness (accumulation_exact), economy (accumulation_economy), and learning, trainings at
equal tokens, among them small batches with a rescaled beta2; accumulation_summary says what they gave.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptcore.checkpoint import load_checkpoint
from gptcore.config import with_changes
from gptcore.entry import run_process
from gptcore.studies import Bench, Cell, CellResult, Study
from gptcore.studies.accumulation.economy import measure_economy, saved_mib
from gptcore.studies.accumulation.exactness import measure_exactness
from gptcore.studies.accumulation.options import AccumulationOptions
from gptcore.studies.accumulation.summary import summarize
from gptcore.studies.short import Outcome, Subject, run_study
from gptcore.timing import measure_ms
from gptcore.train import Trainer, accumulate_gradients, build_trainer


def gradients(trainer: Trainer) -> Tensor:
    """All gradients of one step in one float64 vector."""
    trainer.optimizers.zero_grad()
    accumulate_gradients(trainer)
    return torch.cat([p.grad.double().flatten() for p in trainer.model.parameters() if p.grad is not None])


def measure(subject: Subject) -> Outcome:
    batch, repeats = subject.config.train.global_batch_size, subject.config.studies.repeats
    weights = load_checkpoint(subject.checkpoint).model
    rows: list[dict[str, Any]] = []
    reference: Tensor | None = None
    for steps in (1, subject.config.studies.accumulation_steps):
        config = with_changes(
            subject.config,
            train={"micro_batch_size": batch // steps, "precision": "fp32", "compile": "off"},
            model={"dropout": 0.0},  # random masks differ between arms; without them only rounding does
        )
        trainer = build_trainer(config, subject.shards)
        trainer.model.load_weights(weights)
        timed = measure_ms(lambda trainer=trainer: accumulate_gradients(trainer), trainer.device.synchronize, repeats)  # type: ignore[misc]
        peak, grads = saved_mib(trainer), gradients(trainer)
        reference = grads if reference is None else reference
        rows.append(
            {
                "grad_accum_steps": steps,
                "micro_batch_size": batch // steps,
                "grad_difference": float((grads - reference).norm() / reference.norm()),
                "tok_per_sec": 1e3 * trainer.tokens_per_step / timed.median,
                "tok_per_sec_low": 1e3 * trainer.tokens_per_step / timed.high,
                "tok_per_sec_high": 1e3 * trainer.tokens_per_step / timed.low,
                "peak_mib": peak,
                "n": repeats,
            }
        )
    one, many = rows
    conclusion = (
        f"{many['grad_accum_steps']} micro-steps of {many['micro_batch_size']} sequences give the gradient of one batch of {batch} "
        f"to a relative difference of {many['grad_difference']:.1e}, with {100 * many['peak_mib'] / one['peak_mib']:.0f} % of the memory "
        f"for activations and {many['tok_per_sec'] / one['tok_per_sec']:.2f} times the speed (n={repeats})."
    )
    metrics = {
        "accumulation/grad_difference": many["grad_difference"],
        "accumulation/memory_ratio": many["peak_mib"] / one["peak_mib"],
        "accumulation/speed_ratio": many["tok_per_sec"] / one["tok_per_sec"],
    }
    return Outcome(rows, conclusion, metrics)


# --- the study -----------------------------------------------------------------------------------------------------------


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


def measure_cell(cell: Cell, bench: Bench) -> CellResult:
    kinds = {"exactness": measure_exactness, "economy": measure_economy, "learning": measure_learning}
    return kinds[cell.options.kind](cell, bench)


STUDY = Study("Gradient accumulation", AccumulationOptions, measure_cell, summarize)


def main(argv: list[str]) -> dict[str, Any]:
    return run_study("accumulation", __doc__, measure, argv)


if __name__ == "__main__":
    raise SystemExit(run_process(main))

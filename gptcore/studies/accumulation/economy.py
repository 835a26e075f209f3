"""What micro-batches of different sizes cost and save at constant tokens a step: memory and speed."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from gptcore.config import with_changes
from gptcore.studies import Bench, Cell, CellResult
from gptcore.timing import measure_ms
from gptcore.train import Trainer, accumulate_gradients, build_trainer
from gptcore.train.activations import saved_activations


def measure_economy(cell: Cell, bench: Bench) -> CellResult:
    """Memory and tok/s of the gradients of one step, for each number of micro-steps that divides the batch.

    The sizes take turns, so that a machine that slows down slows all of them.
    """
    config = with_changes(cell.config, train={"micro_batch_size": "auto", "compile": "off"})
    trainer = build_trainer(config, bench.shards)
    batch = trainer.local_batch_size
    sizes = [batch // steps for steps in cell.options.micro_steps if batch % steps == 0]
    memory, times = {}, {size: [] for size in sizes}  # type: ignore[var-annotated]
    for size in sizes:
        trainer.micro_batch_size = size
        memory[size] = saved_mib(trainer)  # also the warm-up
    for _ in range(cell.options.repeats):
        for size in sizes:
            trainer.micro_batch_size = size
            times[size].append(
                measure_ms(lambda: accumulate_gradients(trainer), trainer.device.synchronize, 1, warmups=0).median
            )
            trainer.optimizers.zero_grad()
    rows: list[dict[str, Any]] = [
        {
            "kind": "economy",
            "micro_batch_size": size,
            "micro_steps": batch // size,
            "peak_mib": memory[size],
            "tok_per_sec": 1e3 * trainer.tokens_per_step / statistics.median(times[size]),
            "tok_per_sec_min": 1e3 * trainer.tokens_per_step / max(times[size]),
            "tok_per_sec_max": 1e3 * trainer.tokens_per_step / min(times[size]),
            "repeats": cell.options.repeats,
        }
        for size in sizes
    ]
    metrics = {f"accumulation/tok_per_sec_micro_{row['micro_batch_size']}": row["tok_per_sec"] for row in rows}
    return CellResult(rows, metrics=metrics)


def saved_mib(trainer: Trainer) -> float:
    """Most memory that one step's micro-batches hold for the backward pass, in MiB.

    On a GPU the allocator's peak above what stood before; on a CPU the storages that autograd keeps, summed by micro-step.
    """
    trainer.optimizers.zero_grad()
    if trainer.device.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        accumulate_gradients(trainer)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with saved_activations(trainer.model) as saved:
        accumulate_gradients(trainer)
    return saved.peak_mib

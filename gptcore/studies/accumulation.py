"""One batch in 1 and in several micro-steps: are the gradients the same, what does it save, what does it cost?

python -m gptcore.studies.accumulation CONFIG.yaml --shards DIR --out DIR --checkpoint DIR
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptcore.checkpoint import load_checkpoint
from gptcore.config import with_changes
from gptcore.entry import run_process
from gptcore.studies.short import Outcome, Subject, run_study
from gptcore.timing import measure_ms
from gptcore.train import Trainer, accumulate_gradients, build_trainer


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
    own = {p.untyped_storage().data_ptr() for p in trainer.model.state_dict().values()}
    kept: dict[int, int] = {}
    peak = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal peak
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            peak = max(peak, sum(kept.values()))
        return tensor

    def clear(*_: object) -> None:
        kept.clear()  # a new micro-step begins: the last one's graph is gone

    handle = trainer.model.register_forward_pre_hook(clear)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        accumulate_gradients(trainer)
    handle.remove()
    return peak / 2**20


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
        trainer.model.load_state_dict(weights)
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


def main(argv: list[str]) -> dict[str, Any]:
    return run_study("accumulation", __doc__, measure, argv)


if __name__ == "__main__":
    raise SystemExit(run_process(main))

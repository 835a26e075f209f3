"""Is the gradient of a batch in k micro-steps the gradient of the batch?

The trainer's own accumulation (`gptcore.train.step.backward_all`: sums of target losses, one global divisor) in float64, float32 and
bf16, on full, ragged and masked batches, in one process and in two; beside it the naive way, the mean of the micro-batches' means,
which weighs a target in a short micro-batch more than one in a long one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptcore.checkpoint import load_checkpoint
from gptcore.config import UserError, with_changes, write_yaml
from gptcore.device import choose_device
from gptcore.entry import PARENT_VARIABLE, python_environment
from gptcore.models import LanguageModel
from gptcore.studies import Bench, Cell, CellResult
from gptcore.train import Trainer, build_trainer, train_step
from gptcore.train.step import backward_all, next_batch

BATCHES = ("full", "ragged", "masked")
RANKS = 2
RANKS_TIMEOUT_S = 240


def measure_exactness(cell: Cell, bench: Bench) -> CellResult:
    """Relative distance of gradients, per precision, kind of batch, method and number of micro-steps; see `compare`."""
    config = with_changes(
        cell.config,
        model={"dropout": 0.0},  # random masks differ between splits; without them only rounding does
        train={"micro_batch_size": "auto", "compile": "off", "precision": "fp32"},
    )
    trainer = build_trainer(config, bench.shards)
    batch = trainer.local_batch_size
    uneven = [steps for steps in cell.options.micro_steps if batch % steps]
    if uneven:
        raise UserError(f"options.micro_steps={uneven} do not divide train.global_batch_size={batch}")
    kinds: tuple[str, ...] = BATCHES
    precisions: tuple[str, ...] = ("fp64", "fp32", *(["bf16"] if has_bf16(config.train.device) else []))
    if bench.own is not None:
        kinds, precisions = BATCHES[:1], ("fp32",)  # inside a run seconds count, its batches are full, and no more is shown
        trainer.model.load_weights(load_checkpoint(bench.own.checkpoint).model)
    else:
        for _ in range(cell.options.warm_steps):
            train_step(trainer)
    weights = {name: tensor.clone() for name, tensor in trainer.model.weights().items()}
    x, y = next_batch(trainer)
    rng = torch.Generator().manual_seed(cell.seed)
    batches = {kind: leave_out(y, kind, rng) for kind in kinds}
    rows: list[dict[str, Any]] = []
    use_precision(trainer, weights, "fp64")
    references = {kind: mean_gradient(trainer.model, x, targets) for kind, targets in batches.items()}
    if cell.options.ranks:
        found = gradients_of_ranks(bench, trainer, x, batches)
        front = {"kind": "exactness", "precision": "fp64", "method": f"{RANKS} processes", "micro_steps": RANKS}
        rows += [{**front, "batch": kind, "error": distance(found[kind], references[kind]), "drift": None} for kind in kinds]
    for kind, targets in batches.items():
        reference = references[kind]
        for precision in precisions:
            use_precision(trainer, weights, precision)
            rows += compare(trainer, x, targets, reference, cell.options.micro_steps, {"batch": kind, "precision": precision})
    metrics = {"accumulation/error_naive": max(row["error"] for row in rows if row["method"] == "naive")}
    if exact := [row["error"] for row in rows if row["precision"] == "fp64" and row["method"] != "naive"]:
        metrics["accumulation/error_fp64"] = max(exact)
    return CellResult(rows, metrics=metrics)


def leave_out(y: Tensor, kind: str, rng: torch.Generator) -> Tensor:
    """Targets (B, T) with some set to -1: every sequence cut at a length of its own, or single targets left out at a rate of its own."""
    B, T = y.shape
    if kind == "full":
        return y
    if kind == "ragged":
        lengths = torch.randint(1, T + 1, (B, 1), generator=rng)
        keep = torch.arange(T)[None] < lengths
    else:
        keep = torch.rand(B, T, generator=rng) < torch.rand(B, 1, generator=rng)
        keep[:, 0] = True  # a sequence without any target has no mean
    return torch.where(keep.to(y.device), y, -1)


def compare(
    trainer: Trainer, x: Tensor, y: Tensor, reference: Tensor, micro_steps: tuple[int, ...], front: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows for both methods. error: relative distance to the float64 gradient of the whole batch; drift: to the same precision's
    gradient in one micro-step.
    """
    rows: list[dict[str, Any]] = []
    whole: dict[str, Tensor] = {}
    for steps in micro_steps:
        for method, gradient in (
            ("ours", accumulated_gradient(trainer, x, y, steps)),
            ("naive", mean_of_means_gradient(trainer, x, y, steps)),
        ):
            whole.setdefault(method, gradient)
            rows.append(
                {
                    "kind": "exactness",
                    **front,
                    "method": method,
                    "micro_steps": steps,
                    "error": distance(gradient, reference),
                    "drift": distance(gradient, whole[method]),
                }
            )
    return rows


def accumulated_gradient(trainer: Trainer, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """The trainer's own gradient in `steps` micro-steps. It divides by all targets of a full batch; a constant mends that here."""
    trainer.model.zero_grad(set_to_none=True)
    trainer.micro_batch_size = len(x) // steps
    backward_all(trainer, x, y)
    return flat_gradient(trainer.model) * (trainer.tokens_per_step / int((y >= 0).sum()))


def mean_of_means_gradient(trainer: Trainer, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """What dividing each micro-batch's mean loss by their number gives."""
    trainer.model.zero_grad(set_to_none=True)
    size = len(x) // steps
    for start in range(0, len(x), size):
        with trainer.device.autocast():
            loss = trainer.model(x[start : start + size], y[start : start + size])[1]
        (loss / steps).backward()
    return flat_gradient(trainer.model)


def mean_gradient(model: LanguageModel, x: Tensor, y: Tensor) -> Tensor:
    """Of the whole batch's mean loss, in one piece."""
    model.zero_grad(set_to_none=True)
    loss = model(x, y)[1]
    assert loss is not None
    loss.backward()
    return flat_gradient(model)


def flat_gradient(model: LanguageModel) -> Tensor:
    """All gradients in one float64 vector."""
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def distance(gradient: Tensor, reference: Tensor) -> float:
    """Length of the difference over length of the reference."""
    return float((gradient - reference).norm() / reference.norm())


def use_precision(trainer: Trainer, weights: dict[str, Tensor], precision: str) -> None:
    """The same weights, as the precision holds them; fp64 is the model itself in float64."""
    trainer.model.to(torch.float64 if precision == "fp64" else torch.float32)
    trainer.model.load_weights(weights)
    trainer.device = replace(trainer.device, precision="fp32" if precision == "fp64" else precision)


def has_bf16(device: str) -> bool:
    try:
        choose_device(device, "bf16")
    except UserError:
        return False
    return True


def gradients_of_ranks(bench: Bench, trainer: Trainer, x: Tensor, batches: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each batch's gradient as two processes on CPUs exchange it, in float64. Raises RuntimeError when they fail."""
    folder = bench.out / "ranks"
    folder.mkdir(exist_ok=True)
    tensors = {f"weight/{name}": tensor for name, tensor in trainer.model.weights().items()}
    tensors |= {"x": x, **{f"targets/{kind}": targets for kind, targets in batches.items()}}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / "batch.safetensors")
    config = with_changes(trainer.config, train={"device": "cpu", "precision": "fp32"})
    write_yaml(config, folder / "config.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += ["-m", "gptcore.studies.accumulation.ranks", str(folder / "config.yaml")]
    command += ["--shards", str(bench.shards.directory), "--out", str(folder)]
    environment = python_environment() | {"OMP_NUM_THREADS": "1", PARENT_VARIABLE: str(os.getpid())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=RANKS_TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"two processes: exit code {done.returncode}: {done.stderr[-1500:]}")
    return {kind: tensor.to(x.device) for kind, tensor in load_file(folder / "gradients.safetensors").items()}

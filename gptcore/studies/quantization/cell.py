"""One cell of the quantization study: one method on one trained model. Size, memory, speed, loss, damage by layer and by age, texts."""

from __future__ import annotations

import dataclasses
import gc
import time
from pathlib import Path
from typing import Any

import torch

from gptcore.checkpoint import list_checkpoints, load_model
from gptcore.config import EvaluateConfig, UserError
from gptcore.device import Device
from gptcore.evaluate import Evaluation, bootstrap_bpb, evaluate_loss
from gptcore.generate import generate
from gptcore.models import LanguageModel
from gptcore.models.quantized import has_fp8, layout_of
from gptcore.quantize import Method, calibration_ids, quantize, quantize_checkpoint
from gptcore.quantize.model import stages
from gptcore.store import link_or_copy
from gptcore.studies import Bench, Cell, CellResult
from gptcore.studies.quantization.options import FULL, QuantizationOptions
from gptcore.studies.speed import Speed, compare_speeds, measure_peak
from gptcore.vocab import Vocab


def measure_cell(cell: Cell, bench: Bench) -> CellResult:
    """Train (once for all methods), quantize, save, load, and measure what was loaded."""
    options: QuantizationOptions = cell.options
    method, device = options.chosen(), bench.device
    if method is not None and method.kind == "fp8" and not has_fp8(device.torch):
        raise UserError(f"{device.name} has no FP8 products; this arm needs a GPU of compute capability 8.9 or more")
    trained = bench.train(cell.config)
    path, seconds = trained.checkpoint, 0.0
    if method is not None:
        start = time.perf_counter()
        path = quantize_checkpoint(
            trained.checkpoint,
            method,
            bench.out / "quantized",
            bench.shards,
            device=device.torch,
            calibration_windows=options.windows,
            qat_steps=options.qat_steps,
        )
        seconds = time.perf_counter() - start
    gc.collect()
    model, _ = load_model(path, device.torch)
    # The trained weights are the yardstick in their own arithmetic, not in the one they were trained in.
    plain = Device(device.torch, "fp32", device.name)
    batch_size = cell.config.evaluate.batch_size
    evaluation = evaluate_loss(model, bench.shards, plain, batch_size)
    row: dict[str, Any] = {
        "method": options.method,
        "size_mib": _size_mib(path),
        "val_bpb": evaluation.bpb,
        "parameters": model.count_parameters(),
        "quantize_seconds": seconds,
    }
    for batch in options.batches:
        row[f"peak_mib_{batch}"] = measure_peak(model, device, batch, options.decode_tokens)
    full = model if method is None else load_model(trained.checkpoint, device.torch)[0]
    speeds = compare_speeds(model, full, device, options.batches, options.decode_tokens, options.repeats)
    for job, (ours, theirs) in speeds.items():
        row |= {job: ours.median, f"{job}_speedup": ours.median / theirs.median}
    tables: dict[str, list[dict[str, Any]]] = {"samples": [{"text": sample(model, path, device, options.sample_tokens)}]}
    if method is not None:
        whole = evaluate_loss(full, bench.shards, plain, batch_size)
        row |= delta_over_text(evaluation, whole, cell.config.evaluate)
        decoding = speeds[f"decode_{options.batches[0]}"]
        tables["beside"] = [
            _beside(options, weights, place, result, result.bpb - whole.bpb, speed)
            for weights, place, result, speed in (
                (FULL, trained.checkpoint, whole, decoding[1]),
                (options.method, path, evaluation, decoding[0]),
            )
        ]
    if options.ages:
        tables["ages"] = damage_by_age(cell, bench, list_checkpoints(trained.folder / "checkpoints"), method, plain)
    if options.layers and method is not None:
        tables["layers"] = damage_by_layer(cell, bench, trained.checkpoint, method, plain)
    metrics = {"quant/size_mib": row["size_mib"], "val/bpb": row["val_bpb"]}
    metrics |= {f"quant/tok_per_sec_{batch}": row[f"decode_{batch}"] for batch in options.batches}
    files: tuple[str, ...] = ()
    if bench.own is not None and method is not None:  # a run keeps the model that its report speaks of
        files = (f"model_{options.method}.safetensors",)
        link_or_copy(path / "model.safetensors", bench.out / files[0])
    return CellResult([row], tables, metrics, files)


def _size_mib(checkpoint: Path) -> float:
    return (checkpoint / "model.safetensors").stat().st_size / 2**20


def _beside(
    options: QuantizationOptions, weights: str, checkpoint: Path, evaluation: Evaluation, delta: float, speed: Speed
) -> dict[str, Any]:
    """The method and the trained weights on the same tokens, a row each."""
    return {
        "weights": weights,
        "size_mib": _size_mib(checkpoint),
        "val_bpb": evaluation.bpb,
        "bpb_delta": delta,
        "tok_per_sec": speed.median,
        "tok_per_sec_low": speed.low,
        "tok_per_sec_high": speed.high,
        "n": options.repeats,
    }


def delta_over_text(small: Evaluation, full: Evaluation, settings: EvaluateConfig) -> dict[str, float]:
    """95 % interval of the bits per byte lost, over documents (or sections) drawn anew; what another seed would do it does not hold."""
    lost = dataclasses.replace(small, record_nats=small.record_nats - full.record_nats)
    interval = bootstrap_bpb(lost, settings.bootstrap, settings.seed)
    return {} if interval is None else {"text_low": interval[0], "text_high": interval[1]}


def sample(model: LanguageModel, checkpoint: Path, device: Device, tokens: int) -> str:
    """A text from the start of a document, the same random numbers for every method."""
    vocab = Vocab.load(checkpoint / "tokenizer.json")
    idx = torch.full((1, 1), vocab.eot_id, dtype=torch.int64, device=device.torch)
    rng = torch.Generator(device.torch).manual_seed(0)
    return vocab.decode(generate(model, idx, tokens, rng, temperature=0.8, vocab_size=vocab.size)[0].cpu().numpy())


def damage_by_age(
    cell: Cell, bench: Bench, checkpoints: list[Path], method: Method | None, device: Device
) -> list[dict[str, Any]]:
    """Bits per byte of every saved checkpoint, quantized; without data-driven steps beyond GPTQ's, since fine-tuning is training."""
    rows = []
    for path in checkpoints:
        if bench.stop:
            break
        model, checkpoint = load_model(path, device.torch)
        if method is not None:
            model = quantize(model, method.without_training(), _calibration(cell, bench, model, method))
        evaluation = evaluate_loss(model, bench.shards, device, cell.config.evaluate.batch_size, cell.options.eval_tokens)
        state = checkpoint.state
        rows.append({"step": state["step"], "tokens_seen": state["tokens_seen"], "val_bpb": evaluation.bpb})
    return rows


def damage_by_layer(cell: Cell, bench: Bench, checkpoint: Path, method: Method, device: Device) -> list[dict[str, Any]]:
    """Bits per byte lost by quantizing one matrix and leaving all others in float32, by rounding."""
    model, _ = load_model(checkpoint, device.torch)
    size = cell.config.evaluate.batch_size, cell.options.eval_tokens
    full = evaluate_loss(model, bench.shards, device, *size).bpb
    names = [name for stage in stages(model) for name in stage]
    rows = []
    for name in names:
        small = quantize(model, method.by_rounding().with_parts(only=name), keep_rest=True)
        assert layout_of(small).keys() >= {name}
        bpb = evaluate_loss(small, bench.shards, device, *size).bpb
        rows.append({"layer": name, "bpb_delta": bpb - full})
    return rows


def _calibration(cell: Cell, bench: Bench, model: LanguageModel, method: Method) -> torch.Tensor | None:
    if method.algorithm != "gptq":
        return None
    return calibration_ids(bench.shards, model.block_size, cell.options.windows)

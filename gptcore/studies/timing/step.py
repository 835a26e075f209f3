"""The inside of a training step, for one arm: sections by a clock, undisturbed steps beside it, what limits it."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch

from gptcore.config import UserError, with_changes
from gptcore.studies import Bench, Cell, CellResult
from gptcore.studies.timing.peaks import Trace, count_traffic, measure_peaks, trace_step
from gptcore.studies.timing.pipeline import check_sum
from gptcore.studies.timing.sections import label, sections, trains
from gptcore.timing import MapClock, Path
from gptcore.train import Trainer, build_trainer, preflight, train_step
from gptcore.train.graph import WARMUP_STEPS
from gptcore.train.step import next_batch
from gptcore.train.trainer import missing_compiler

TRACE = "trace.json.gz"
REST = "rest of the step"
MOST_MEMORY_POINTS = 400


def measure_step(cell: Cell, bench: Bench) -> CellResult:
    """Sections of a step, its speed against the device's peaks, the profiler's second opinion, memory over time.

    Raises RuntimeError when sections do not add up to the wall time, UserError when a compiler is asked for and missing.
    """
    repeats = cell.options.repeats
    steps = 2 * repeats + 10
    config = with_changes(cell.config, train={"max_steps": steps, "warmup_steps": min(steps, cell.config.train.warmup_steps)})
    use_compile = config.train.compile == "on"
    if use_compile and (lacking := missing_compiler(bench.device)):
        raise UserError(f"train.compile=on: {lacking}, so there is nothing to measure")
    trainer = build_trainer(config, bench.shards)
    start = time.perf_counter()
    estimate = preflight(trainer)  # compiles, where that is to be
    preparation_s = time.perf_counter() - start
    # A CUDA graph is recorded by then: the clock, which waits for the device, would break it.
    for _ in range(WARMUP_STEPS + 1):
        train_step(trainer)
    plain, clocked, walls, maps = [], [], [], []
    bare = trainer.clock
    for _ in range(repeats):  # in turns, so that a machine that slows down slows both
        trainer.clock = bare
        plain.append(_timed_step(trainer))
        clock = MapClock(bench.device.synchronize)
        trainer.clock = clock
        # Hooks inside a compiled model would cut it into pieces: there, forward stays whole.
        with nullcontext() if use_compile else sections(trainer.model, clock):
            began = time.time()  # another clock than the map's
            with clock.phase(REST):
                train_step(trainer)
            walls.append(time.time() - began)
        clocked.append(sum(clock.paths.values()))
        maps.append(clock.paths)
    # Of the steps the one in the middle: what interrupts a step of 2 ms between two readings is no section's fault.
    pairs = sorted(zip(clocked, walls, strict=True), key=lambda pair: pair[0] / pair[1])
    check_sum(*pairs[len(pairs) // 2], cell.options.tolerance)
    rows = _section_rows(maps)
    trainer.clock = traced = MapClock(bench.device.synchronize)
    trace = trace_step(trainer, traced, lambda: train_step(trainer), bench.out / TRACE)
    gap = _gap(_inclusive_ms(traced), trace)  # before anything else runs on this clock
    trainer.clock = bare
    facts = _facts(trainer, plain, clocked, trace, bench) | {
        "profiler_gap": gap,
        "preparation_s": preparation_s,
        "parameters": estimate.parameters,
        "micro_batch_size": trainer.micro_batch_size,
        "repeats": repeats,
    }
    memory = _thinned(trace.memory)
    metrics = {f"timing/{key}": float(value) for key, value in facts.items() if isinstance(value, (int, float))}
    return CellResult([{"kind": "step", **facts}], {"sections": rows, "memory": memory}, metrics, (TRACE,))


def _timed_step(trainer: Trainer) -> float:
    trainer.device.synchronize()
    start = time.perf_counter()
    train_step(trainer)
    trainer.device.synchronize()
    return time.perf_counter() - start


def _section_rows(maps: list[dict[Path, float]]) -> list[dict[str, Any]]:
    """Mean milliseconds of every path over the clocked steps, which add up as medians would not, with its share of the mean step."""
    whole = statistics.mean(sum(paths.values()) for paths in maps)
    rows = []
    for path in dict.fromkeys(path for paths in maps for path in paths):
        values = [paths.get(path, 0.0) for paths in maps]
        name = label(path[1:]) if len(path) > 1 else REST
        rows.append(
            {
                "section": name,
                "ms": 1e3 * statistics.mean(values),
                "ms_min": 1e3 * min(values),
                "ms_max": 1e3 * max(values),
                "share": statistics.mean(values) / whole,
                "trains": trains(path),
            }
        )
    return sorted(rows, key=lambda row: -row["ms"])


def _facts(trainer: Trainer, plain: list[float], clocked: list[float], trace: Trace, bench: Bench) -> dict[str, Any]:
    """One row: speed, what it is of the peaks, where the step lies under the roofline, what launching costs."""
    step_s = statistics.median(plain)
    peaks = measure_peaks(bench.device)
    traffic = count_traffic(trainer, *next_batch(trainer))
    flops = trainer.model.flops_per_token() * trainer.tokens_per_step
    sheet = bench.device.peak_flops
    return {
        "device": bench.device.name,
        "precision": bench.device.precision,
        "step_ms": 1e3 * step_s,
        "step_ms_min": 1e3 * min(plain),
        "step_ms_max": 1e3 * max(plain),
        "clocked_ms": 1e3 * statistics.median(clocked),
        "clock_cost": statistics.median(clocked) / step_s - 1,
        "profiler_cost": trace.wall_ms / (1e3 * step_s) - 1,
        "tok_per_sec": trainer.tokens_per_step / step_s,
        "flops_per_step": flops,
        "flops_per_sec": flops / step_s,
        "peak_flops": peaks.flops,
        "of_peak": flops / step_s / peaks.flops,
        "mfu": None if sheet is None else flops / step_s / sheet,
        "bytes_per_step": float(traffic.bytes),
        "bytes_per_sec": traffic.bytes / step_s,
        "peak_bandwidth": peaks.bandwidth,
        "of_bandwidth": traffic.bytes / step_s / peaks.bandwidth,
        "intensity": flops / traffic.bytes,
        "ridge": peaks.flops / peaks.bandwidth,
        "operators": traffic.operators,
        "us_per_operator": 1e6 * step_s / traffic.operators,
        "kernels": trace.kernels if bench.device.is_cuda else None,
        "busy_share": trace.busy_share,
        "peak_mib": max((mib for _, mib in trace.memory), default=None),
        "threads": torch.get_num_threads(),
    }


def _inclusive_ms(clock: MapClock) -> dict[str, float]:
    """Milliseconds of each phase with all that is inside it."""
    totals: dict[str, float] = {}
    for path, seconds in clock.paths.items():
        for name in path:
            totals[name] = totals.get(name, 0.0) + 1e3 * seconds
    return totals


def _gap(own: dict[str, float], trace: Trace) -> float:
    """How far our clock (`own`, ms by phase) and the profiler's are apart on the same step, as a share of the phases' time.

    Raises RuntimeError where they have nothing in common to compare.
    """
    names = own.keys() & trace.phases_ms.keys()
    if not names:
        raise RuntimeError("the profiler's trace holds none of the step's phases")
    theirs = sum(trace.phases_ms[name] for name in names)
    return sum(abs(own[name] - trace.phases_ms[name]) for name in names) / theirs


def _thinned(points: list[tuple[float, float]]) -> list[dict[str, Any]]:
    """The highest of every few points: a peak must not be lost."""
    stride = -(-len(points) // MOST_MEMORY_POINTS) if points else 1
    return [
        {"kind": "step", "ms": chunk[0][0], "mib": max(mib for _, mib in chunk)}
        for chunk in (points[i : i + stride] for i in range(0, len(points), stride))
    ]

"""What the device could do at most, measured in the same minute, and what a step asks of it: FLOPs, bytes, kernels."""

from __future__ import annotations

import gzip
import json
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptcore.device import Device
from gptcore.timing import MapClock, measure_ms
from gptcore.train import Trainer
from gptcore.train.step import backward_all

MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}
COPY_MIB = {"cpu": 256, "cuda": 2048}


@dataclass(frozen=True)
class Peaks:
    """The best this device reached: one large square product in the run's precision, one large copy."""

    flops: float  # FLOP/s
    bandwidth: float  # bytes/s, read and written


def measure_peaks(device: Device) -> Peaks:
    """The fastest of a few tries each; about two seconds on a CPU."""
    kind, n = device.torch.type, MATMUL_SIZE[device.torch.type]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}.get(device.precision, torch.float32)
    a, b = (torch.randn(n, n, device=device.torch, dtype=dtype) for _ in range(2))
    product = measure_ms(lambda: a @ b, device.synchronize, 8, warmups=2)
    source = torch.ones(COPY_MIB[kind] * 2**20 // 4, device=device.torch)
    target = torch.empty_like(source)
    copy = measure_ms(lambda: target.copy_(source), device.synchronize, 8, warmups=2)
    return Peaks(2 * n**3 / (product.low / 1e3), 2 * source.nbytes / (copy.low / 1e3))


class TrafficCounter(TorchDispatchMode):
    """Bytes that operators read and write when none is fused with another, and how many operators there are. Views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view:
            self.operators += 1
            flat = [*torch.utils._pytree.tree_leaves(args), *torch.utils._pytree.tree_leaves(result)]
            self.bytes += sum(t.nbytes for t in flat if isinstance(t, Tensor))
        return result


def count_traffic(trainer: Trainer, x: Tensor, y: Tensor) -> TrafficCounter:
    """Of one forward and backward pass, uncompiled; gradients are cleared."""
    forward, trainer.forward = trainer.forward, trainer.model
    counter = TrafficCounter()
    try:
        with counter:
            backward_all(trainer, x, y)
    finally:
        trainer.forward = forward
        trainer.optimizers.zero_grad()
    return counter


@dataclass(frozen=True)
class Trace:
    """What a profiler's trace of one step says."""

    wall_ms: float  # with the profiler at work
    phases_ms: dict[str, float]  # by the profiler's own clock, outermost phases
    kernels: int  # on a GPU
    busy_share: float | None  # of the step that some kernel ran, on a GPU
    memory: list[tuple[float, float]]  # ms from the start, MiB allocated


def trace_step(trainer: Trainer, clock: MapClock, step: Any, path: Path) -> Trace:
    """One step, by the trainer's `clock` too, as a Chrome trace at `path` (ui.perfetto.dev opens it), and its figures. The phases are marked in it."""
    from torch.profiler import ProfilerActivity, profile, record_function

    original = clock.phase

    def marked(name: str) -> Any:
        stack = ExitStack()
        stack.enter_context(original(name))
        stack.enter_context(record_function(f"phase: {name}"))
        return stack

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if trainer.device.is_cuda else [])]
    clock.phase = marked  # type: ignore[method-assign]
    try:
        with profile(activities=activities, profile_memory=True):
            step()  # the profiler's own beginnings
        clock.paths.clear()
        with profile(activities=activities, profile_memory=True) as profiler:
            start = time.perf_counter()
            step()
            trainer.device.synchronize()
            wall_ms = 1e3 * (time.perf_counter() - start)
    finally:
        clock.phase = original  # type: ignore[method-assign]
    profiler.export_chrome_trace(str(path))
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        return read_trace(json.load(file)["traceEvents"], wall_ms, trainer.device)


def read_trace(events: list[dict[str, Any]], wall_ms: float, device: Device) -> Trace:
    """Figures of a trace's events (times in µs)."""
    phases: dict[str, float] = {}
    kernels: list[tuple[float, float]] = []
    memory: list[tuple[float, float]] = []
    wanted = 1 if device.is_cuda else 0  # kineto's number of the device's kind
    for event in events:
        name = str(event.get("name", ""))
        if name.startswith("phase: ") and event.get("cat") == "user_annotation":
            phases[name.removeprefix("phase: ")] = phases.get(name.removeprefix("phase: "), 0.0) + event["dur"] / 1e3
        elif event.get("cat") == "kernel":
            kernels.append((event["ts"], event["ts"] + event["dur"]))
        elif name == "[memory]" and event["args"].get("Device Type") == wanted:
            memory.append((event["ts"] / 1e3, event["args"]["Total Allocated"] / 2**20))
    memory.sort()
    first = memory[0][0] if memory else 0.0
    busy = _covered(kernels) / 1e3 / wall_ms if device.is_cuda else None
    return Trace(wall_ms, phases, len(kernels), busy, [(t - first, m) for t, m in memory])


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total

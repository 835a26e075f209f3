"""Speed and memory of generation for the model studies: each model's own, and two models taking turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from gptcore.device import Device
from gptcore.generate import generate
from gptcore.models import LanguageModel
from gptcore.timing import Measurement, measure_ms


def decode(model: LanguageModel, device: Device, batch: int, tokens: int) -> None:
    """Generate `tokens` ids a row over a cache, sampling included."""
    idx = torch.zeros(batch, 1, dtype=torch.int64, device=device.torch)
    generate(model, idx, min(tokens, model.block_size), torch.Generator(device.torch).manual_seed(0))


@torch.inference_mode()
def prefill(model: LanguageModel, device: Device) -> None:
    """Read a whole context at once into a cache."""
    model(torch.zeros(1, model.block_size, dtype=torch.int64, device=device.torch), cache=model.new_cache(1))


def measure_decoding(model: LanguageModel, device: Device, batch: int, tokens: int, repeats: int) -> Measurement:
    """`decode`, in ms."""
    return measure_ms(lambda: decode(model, device, batch, tokens), device.synchronize, repeats)


@dataclass(frozen=True)
class Speed:
    """Tokens a second: the median repeat, the slowest, the fastest."""

    median: float
    low: float
    high: float


def compare_speeds(
    model: LanguageModel, full: LanguageModel, device: Device, batches: tuple[int, ...], tokens: int, repeats: int
) -> dict[str, tuple[Speed, Speed]]:
    """`decode_N` for each batch N, and `prefill`: the speed of `model`, that of `full`.

    Both take turns, so that a machine that slows down slows both; one warm-up each.
    """
    found = {}
    jobs: dict[str, tuple[int, Callable[[LanguageModel], None]]] = {
        f"decode_{batch}": (batch * min(tokens, model.block_size), partial(decode, device=device, batch=batch, tokens=tokens))
        for batch in batches
    }
    jobs["prefill"] = (model.block_size, partial(prefill, device=device))
    for name, (n_tokens, job) in jobs.items():
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(repeats + 1):
            for one, kept in zip((model, full), times, strict=True):
                timed = measure_ms(partial(job, one), device.synchronize, 1, warmups=0)
                if turn:
                    kept.append(timed.median)
        ours, theirs = (
            Speed(*(1e3 * n_tokens / ms for ms in (statistics.median(kept), max(kept), min(kept)))) for kept in times
        )
        found[name] = (ours, theirs)
    return found


def measure_peak(model: LanguageModel, device: Device, batch: int, tokens: int) -> float | None:
    """Peak of memory during a decoding, in MiB: on a GPU of the model and what its decoding adds; on Linux the whole process's resident
    set; else None."""
    if device.is_cuda:
        # Not the allocator's whole peak: an earlier cell's training may have left something behind in this process.
        before = torch.cuda.memory_allocated(device.torch)
        torch.cuda.reset_peak_memory_stats(device.torch)
        decode(model, device, batch, tokens)
        added = torch.cuda.max_memory_allocated(device.torch) - before
        return (added + sum(tensor.nbytes for tensor in model.weights().values())) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the resident set's high-water mark starts from now
    except OSError:
        return None
    decode(model, device, batch, tokens)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10

"""Clocks: where wall time goes (PhaseClock) and how long one thing takes (measure_ms).

Rules (after nanochat and modded-nanogpt): warm up and discard, synchronise the device at both ends, report the median
with its range, stop the clock during evaluation and saving.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class PhaseClock:
    """Wall seconds by phase. Phases do not overlap: entering one inside another pauses the outer."""

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._synchronize = synchronize  # makes a GPU's phases exact at the price of overlap: for measurements only
        self._stack: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def _charge(self) -> None:
        if self._synchronize is not None:
            self._synchronize()
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] = self.seconds.get(self._stack[-1], 0.0) + now - self._since
        self._since = now


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of one call over `n` timed repeats."""

    median: float
    low: float  # fastest
    high: float  # slowest
    n: int


def measure_ms(
    call: Callable[[], object], synchronize: Callable[[], None], repeats: int, warmups: int = 1
) -> Measurement:
    """Time `call` between two synchronisations, `repeats` times after `warmups` discarded calls."""
    for _ in range(warmups):
        call()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return Measurement(statistics.median(times), min(times), max(times), repeats)


def format_seconds(seconds: float) -> str:
    """`75` → `1m15s`: for progress lines."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"

"""Clocks: where wall time goes (PhaseClock, and MapClock by nesting) and how long one thing takes (measure_ms).

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


Path = tuple[str, ...]


class MapClock(PhaseClock):
    """A PhaseClock that keeps apart where a phase was entered: the timing map. Times are of a path itself, without what is inside it,
    so they add up to the wall time of the outermost phase.

    `cpu_seconds` is the processor time of this process (all threads, no children) over the same stretches.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        super().__init__(synchronize)
        self.paths: dict[Path, float] = {}
        self.cpu_seconds: dict[Path, float] = {}
        self.calls: dict[Path, int] = {}
        self._cpu_since = time.process_time()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with super().phase(name):
            path = tuple(self._stack)
            self.calls[path] = self.calls.get(path, 0) + 1
            yield

    def _charge(self) -> None:
        since = self._since
        super()._charge()
        path, cpu = tuple(self._stack), time.process_time()
        if path:
            self.paths[path] = self.paths.get(path, 0.0) + self._since - since
            self.cpu_seconds[path] = self.cpu_seconds.get(path, 0.0) + cpu - self._cpu_since
        self._cpu_since = cpu


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of one call over `n` timed repeats."""

    median: float
    low: float  # fastest
    high: float  # slowest
    n: int


def measure_ms(call: Callable[[], object], synchronize: Callable[[], None], repeats: int, warmups: int = 1) -> Measurement:
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

"""What a process and its machine use, as numbers for the journal: by psutil, and for an NVIDIA GPU by NVML (nvidia-ml-py).

What cannot be read here (a package that is not installed, a GPU in slices) is left out. A take is empty within a second of the last
one, so that the fastest steps do not notice; a GPU's use, of which NVML tells only the last moment, is looked at once a second from
a thread that otherwise sleeps.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from typing import Any

# A box that only trains has neither, and trains all the same.
try:
    import psutil
except ImportError:
    psutil = None
try:
    import pynvml
except ImportError:
    pynvml = None

LOOK_S = 1.0  # between two looks, at least


class Usage:
    """Counters since the last `take`, memory as it is now. CPU use of the process is 100 % a core; of the machine, 100 % is all cores busy."""

    def __init__(self, gpu_uuid: str | None = None) -> None:
        self._before = (time.monotonic(), process_seconds())
        self._gpu = Gpu.find(gpu_uuid) if gpu_uuid else None
        machine()  # counts from here on

    def take(self) -> dict[str, float]:
        now = (time.monotonic(), process_seconds())
        if now[0] - self._before[0] < LOOK_S:
            return {}
        (wall, process), self._before = self._before, now
        values: dict[str, float] = {}
        if now[0] > wall:
            values["system/cpu_process_percent"] = 100 * (now[1] - process) / (now[0] - wall)
        return values | machine() | (self._gpu.take() if self._gpu else {})


def process_seconds() -> float:
    """CPU seconds of this process, all its threads, so far."""
    times = os.times()
    return times.user + times.system


def machine() -> dict[str, float]:
    """The share of the CPUs' time that was busy since the last call (of the host's, in a container), and of memory that is taken now;
    MiB that this process holds of it."""
    if psutil is None:
        return {}
    try:
        memory, own = psutil.virtual_memory(), psutil.Process().memory_info()
    except (psutil.Error, OSError):
        return {}
    return {
        "system/cpu_machine_percent": psutil.cpu_percent(),
        "system/memory_process_mib": own.rss / 2**20,
        # Not psutil's `used`: what caches hold is free as soon as somebody needs it.
        "system/memory_machine_percent": 100 * (1 - memory.available / memory.total),
    }


class Gpu:
    """One GPU, by the handle that NVML knows it by."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._looks: list[float] = []
        threading.Thread(target=self._watch, name="gptloom-gpu-usage", daemon=True).start()

    @classmethod
    def find(cls, uuid: str) -> Gpu | None:
        """The GPU of that UUID; None where the driver or the package is not there, or does not know it."""
        if pynvml is None:
            return None
        try:
            pynvml.nvmlInit()
            return cls(pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"))
        except pynvml.NVMLError:
            return None

    def take(self) -> dict[str, float]:
        """Share of the time since the last take in which the GPU was busy, and MiB taken on it now, by whomever."""
        looks, self._looks = self._looks, []
        values = {"system/gpu_percent": statistics.fmean(looks)} if looks else {}
        with contextlib.suppress(pynvml.NVMLError):
            values["system/gpu_memory_mib"] = pynvml.nvmlDeviceGetMemoryInfo(self._handle).used / 2**20
        return values

    def _watch(self) -> None:
        try:
            while True:
                self._looks.append(float(pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu))
                time.sleep(LOOK_S)
        except pynvml.NVMLError:
            return  # in slices it has no such figure

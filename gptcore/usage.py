"""What a process and its machine use, as numbers for the journal: CPU and memory from /proc, a GPU from NVIDIA's NVML.

    usage = Usage(gpu_uuid)      # None: no GPU
    usage.take()                 # {"system/cpu_process_percent": 187.0, …}: means since the last take, memory as it is now

What cannot be read here (no /proc, no NVML, a GPU in slices) is left out. A take costs about 0.2 ms and is empty within a
second of the last one, so that the fastest steps do not notice; a GPU's use, of which NVML tells only the last moment, is
looked at once a second from a thread that otherwise sleeps.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import threading
import time
from pathlib import Path

PROC = Path("/proc")
LOOK_S = 1.0  # between two looks, at least


class Usage:
    """Counters since the last `take`. CPU use of the process is 100 % a core; of the machine, 100 % is all cores busy."""

    def __init__(self, gpu_uuid: str | None = None) -> None:
        self._before = (time.monotonic(), process_seconds(), machine_ticks())
        self._gpu = Gpu.find(gpu_uuid) if gpu_uuid else None

    def take(self) -> dict[str, float]:
        if time.monotonic() - self._before[0] < LOOK_S:
            return {}
        now = (time.monotonic(), process_seconds(), machine_ticks())
        (wall, process, machine), self._before = self._before, now
        values: dict[str, float] = {}
        if now[0] > wall:
            values["system/cpu_process_percent"] = 100 * (now[1] - process) / (now[0] - wall)
        if machine and now[2] and (all_ticks := now[2][1] - machine[1]) > 0:
            values["system/cpu_machine_percent"] = 100 * (now[2][0] - machine[0]) / all_ticks
        return values | memory() | (self._gpu.take() if self._gpu else {})


def process_seconds() -> float:
    """CPU seconds of this process, all its threads, so far."""
    times = os.times()
    return times.user + times.system


def machine_ticks() -> tuple[int, int] | None:
    """(busy, all) clock ticks of the machine's CPUs so far; of the host's, in a container."""
    try:
        ticks = [int(word) for word in PROC.joinpath("stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    idle = ticks[3] + ticks[4]  # idle, and idle while waiting for a disk
    return sum(ticks) - idle, sum(ticks)


def memory() -> dict[str, float]:
    """MiB that this process holds in memory now, and the share of the machine's that is taken."""
    try:
        pages = int(PROC.joinpath("self/statm").read_text(encoding="ascii").split()[1])
        lines = PROC.joinpath("meminfo").read_text(encoding="ascii").splitlines()
        kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        taken = 100 * (1 - kib["MemAvailable"] / kib["MemTotal"])
    except (OSError, ValueError, KeyError, IndexError):
        return {}
    return {"system/memory_process_mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20, "system/memory_machine_percent": taken}


class _Rates(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class Gpu:
    """One GPU, through the driver's own library: nothing to install, and no process to start."""

    def __init__(self, nvml: ctypes.CDLL, handle: ctypes.c_void_p) -> None:
        self._nvml, self._handle = nvml, handle
        self._looks: list[float] = []
        threading.Thread(target=self._watch, name="gptloom-gpu-usage", daemon=True).start()

    @classmethod
    def find(cls, uuid: str) -> Gpu | None:
        """The GPU of that UUID; None where the driver's library is not there, or does not know it."""
        handle = ctypes.c_void_p()
        try:
            nvml = ctypes.CDLL("libnvidia-ml.so.1")
            is_there = nvml.nvmlInit_v2() == 0
        except (OSError, AttributeError):
            return None
        name = (uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}").encode()
        if not is_there or nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)) != 0:
            return None
        return cls(nvml, handle)

    def take(self) -> dict[str, float]:
        """Share of the time since the last take in which the GPU was busy, and MiB taken on it now, by whomever."""
        looks, self._looks = self._looks, []
        values = {"system/gpu_percent": statistics.fmean(looks)} if looks else {}
        held = _Memory()
        if self._nvml.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(held)) == 0:
            values["system/gpu_memory_mib"] = held.used / 2**20
        return values

    def _watch(self) -> None:
        rates = _Rates()
        while self._nvml.nvmlDeviceGetUtilizationRates(self._handle, ctypes.byref(rates)) == 0:
            self._looks.append(float(rates.gpu))
            time.sleep(LOOK_S)

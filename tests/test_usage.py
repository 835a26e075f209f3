"""What a run says of its machine is measured, or left out."""

import math
import time
from types import SimpleNamespace

import pytest

from gptcore import usage
from gptcore.usage import Gpu, Usage


def test_work_shows_and_what_is_not_there_does_not(monkeypatch):
    """A figure that is made up, such as the GPU of a machine that has none, is worse than a gap."""
    monkeypatch.setattr(usage, "LOOK_S", 0.0)
    meter = Usage("GPU-00000000-0000-0000-0000-000000000000")
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    values = meter.take()
    assert all(math.isfinite(value) for value in values.values())
    assert values["system/cpu_process_percent"] > 0
    assert values["system/memory_process_mib"] > 1
    assert 0 <= values["system/cpu_machine_percent"] <= 100
    assert not [key for key in values if "gpu" in key]
    monkeypatch.setattr(usage, "psutil", None)  # as on a box that only trains
    monkeypatch.setattr(usage, "pynvml", None)
    assert set(Usage("GPU-00000000-0000-0000-0000-000000000000").take()) <= {"system/cpu_process_percent"}


def test_gpu_is_a_mean_of_looks(monkeypatch):
    """NVML tells the last moment only: one look at the end of an evaluation would call a busy GPU idle."""
    rates = iter((100, 50, 0))

    def look(_handle):
        if (rate := next(rates, None)) is None:
            raise KeyError("no more looks")
        return SimpleNamespace(gpu=rate)

    nvml = SimpleNamespace(
        NVMLError=KeyError,
        nvmlDeviceGetUtilizationRates=look,
        nvmlDeviceGetMemoryInfo=lambda _handle: SimpleNamespace(used=3 << 20),
    )
    monkeypatch.setattr(usage, "LOOK_S", 0.0)
    monkeypatch.setattr(usage, "pynvml", nvml)
    gpu = Gpu(None)
    deadline = time.monotonic() + 5
    while len(gpu._looks) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert gpu.take() == {"system/gpu_percent": pytest.approx(50), "system/gpu_memory_mib": 3.0}

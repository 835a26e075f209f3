"""The device a process computes on: which one, in which arithmetic, from which seed, and for whom it is reserved.

python -m gptcore.device                # what this machine has
python -m gptcore.device cuda fp8       # has it this device, and on it this precision? Exit code 2 and a sentence if not
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from gptcore.config import UserError
from gptcore.entry import run_process
from gptcore.locks import take_lock, try_lock

log = logging.getLogger(__name__)

# Dense bf16 peak in TFLOP/s by a part of the device's name (vendors' data sheets). No guess for a name that is not here: MFU
# is then left out.
PEAKS = {"H200": 989, "H100 80GB HBM3": 989, "H100 PCIe": 756, "A100": 312}
PEAKS |= {"L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 3090": 71}

# Workspaces of cuBLAS with which its products are deterministic; the second also serves cuDNN's recurrent layers.
WORKSPACE_VARIABLE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


@dataclass(frozen=True)
class Device:
    """A torch device with the arithmetic chosen for it."""

    torch: torch.device
    precision: str  # fp32, tf32, bf16, fp16 or fp8: what `auto` became
    name: str

    @property
    def is_cuda(self) -> bool:
        return self.torch.type == "cuda"

    @property
    def peak_flops(self) -> float | None:
        """Dense bf16 peak in FLOP/s; None for a device whose data sheet is not in PEAKS."""
        return next((tflops * 1e12 for part, tflops in PEAKS.items() if part in self.name), None)

    @property
    def uuid(self) -> str | None:
        """The GPU's own name for itself, which no order of cards changes."""
        return str(torch.cuda.get_device_properties(self.torch).uuid) if self.is_cuda else None

    def tags(self) -> dict[str, str]:
        """What a run's journal says of where it was computed."""
        return {"gptloom.device": self.name, "gptloom.precision": self.precision}

    def autocast(self) -> AbstractContextManager[object]:
        """Matrix products in 16 bits where the precision says so; fp8 is bf16 for all that is not a large product."""
        if self.precision in ("fp32", "tf32"):
            return nullcontext()
        return torch.autocast(self.torch.type, torch.float16 if self.precision == "fp16" else torch.bfloat16)

    def attention(self, dropout: float) -> AbstractContextManager[object]:
        """Which attention kernels are tried first on a GPU: cuDNN's, the fastest on Hopper, then flash, then the rest."""
        if not self.is_cuda:
            return nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        if not torch.are_deterministic_algorithms_enabled():  # its gradients are sums in any order
            # cuDNN's dropout was not measured, so with dropout flash goes first.
            backends.insert(1 if dropout else 0, SDPBackend.CUDNN_ATTENTION)
        return sdpa_kernel(backends, set_priority=True)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.torch)

    def free_mib(self) -> float:
        """Memory that a new job could take now, in MiB: on a CPU the machine's, or the container's if that is less."""
        if self.is_cuda:
            there, total = torch.cuda.mem_get_info(self.torch)
            allowed = total * torch.cuda.get_per_process_memory_fraction(self.torch.index)
            return min(there, allowed - torch.cuda.memory_allocated(self.torch)) / 2**20
        lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
        free = next((int(line.split()[1]) / 2**10 for line in lines if line.startswith("MemAvailable")), float("inf"))
        with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit ("max")
            free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()) / 2**20)
        return free

    def peak_mib(self) -> float:
        """Most memory allocated since the last call, in MiB: on a GPU the allocator's, on a CPU the process's resident set ever."""
        if self.is_cuda:
            peak = torch.cuda.max_memory_allocated(self.torch)
            torch.cuda.reset_peak_memory_stats(self.torch)
            return peak / 2**20
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def choose_device(device: str = "auto", precision: str = "auto") -> Device:
    """Resolve `train.device` and `train.precision`. Raises UserError for a device that is not there or an arithmetic that it lacks."""
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise UserError("train.device=cuda: this machine has no usable CUDA GPU; use train.device=auto or cpu")
    chosen = torch.device("cuda" if device in ("auto", "cuda") and has_cuda else "cpu")
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else _cpu_name()
    has = _precisions(chosen)
    if precision == "auto":
        precision = "bf16" if chosen.type == "cuda" and "bf16" in has else "fp32"
    if precision not in has:
        raise UserError(f"train.precision={precision}: {name} has no {precision}; use train.precision=auto or {', '.join(has)}")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    return Device(chosen, precision, name)


def _precisions(device: torch.device) -> list[str]:
    """What the device computes in, by asking it."""
    if device.type == "cpu":
        return ["fp32"] + (["bf16"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [])
    capability = torch.cuda.get_device_capability(device)
    has = {"fp32": True, "fp16": True, "tf32": capability >= (8, 0), "bf16": torch.cuda.is_bf16_supported()}
    return [name for name, is_there in (has | {"fp8": capability >= (8, 9)}).items() if is_there]


def set_determinism(is_on: bool, device: Device, is_recurrent: bool = False) -> None:
    """Whether operations give the same bits every time, on a GPU too; torch refuses what cannot (see `naming_refusals`).

    torch.compile then measures nothing that numerics depend on. cuBLAS reads its variable once, so call this before the first
    product. is_recurrent: of cuDNN's layers. Raises UserError where the environment asks for another workspace.
    """
    if is_on == torch.are_deterministic_algorithms_enabled():
        return
    if is_on and device.is_cuda:
        chosen = os.environ.setdefault(WORKSPACE_VARIABLE, WORKSPACES[1 if is_recurrent else 0])
        if chosen not in WORKSPACES:
            raise UserError(
                f"train.deterministic=true: {WORKSPACE_VARIABLE}={chosen} lets products add up in any order; unset it, or make "
                f"it {' or '.join(WORKSPACES)}"
            )
    torch.use_deterministic_algorithms(is_on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads it


@contextmanager
def naming_refusals() -> Iterator[None]:
    """Turns what torch says of an operation without a deterministic form into a UserError that names the field."""
    try:
        yield
    except RuntimeError as error:
        # torch has no class or code for it: its words are all there is to tell it from other errors.
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise UserError(
            f"train.deterministic=true: {str(error).partition(' does not')[0]} has no deterministic form on this device; use "
            "train.deterministic=false, or another model.family"
        ) from error


@contextmanager
def reserve_device(device: Device) -> Iterator[None]:
    """Wait for the one training slot of a GPU, machine-wide, whoever has it, and hold it; a CPU is shared freely."""
    if not device.is_cuda:
        yield
        return
    fd = _open_lock(Path(tempfile.gettempdir()) / f"gptloom-{device.uuid}.lock")
    try:
        if not try_lock(fd):
            log.info("waiting for %s: another training holds it", device.name)
            take_lock(fd)
        yield
    finally:
        os.close(fd)


def _open_lock(path: Path) -> int:
    """A lock file that every user of the machine can take, whatever their umask; never through somebody's link.

    An existing one is opened without O_CREAT: in a shared folder Linux refuses that for another user's file.
    """
    with contextlib.suppress(FileNotFoundError):
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    os.fchmod(fd, 0o666)
    return fd


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model} ({torch.get_num_threads()} threads)"


def main(argv: list[str]) -> dict[str, object]:
    device = choose_device(*argv[:2])
    return {"device": device.torch.type, "name": device.name, "precision": device.precision, "torch": torch.__version__}


if __name__ == "__main__":
    raise SystemExit(run_process(main))

"""The arithmetic of scaling.md, which says what is assumed: what a training step on p GPUs should cost, as Markdown.

python docs/scaling_model.py                      # an H100 host by its data sheet: 1 to 64 GPUs
python docs/scaling_model.py RESULT.json          # from one GPU's measured steps, the last line of benchmarks/scaling.py
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Machine:
    """Hosts of one kind. Bandwidths are of one GPU and one direction, bytes a second; latencies of one step between two GPUs, seconds."""

    peak_flops: float = 989e12
    memory: float = 80e9  # bytes
    memory_speed: float = 3.35e12  # bytes a second
    mfu: float = 0.5  # of forward and backward on one GPU
    host_gpus: int = 8
    link: float = 0.8 * 450e9
    network: float = 0.8 * 50e9
    link_latency: float = 3e-6
    network_latency: float = 10e-6
    contention: float = 0.0  # how much an exchange slows the computing beside it
    ns_mfu: float = 0.5  # of Newton-Schulz

    def bandwidth(self, p: int) -> float:
        """Of a ring through p GPUs: beyond one host every GPU's own adapter carries a ring, eight of them share the work."""
        return self.link if p <= self.host_gpus else min(self.link, self.host_gpus * self.network)

    def latency(self, p: int) -> float:
        """Of one all-gather: a ring within a host, a double tree between hosts (NCCL's choice for small messages)."""
        hosts = -(-p // self.host_gpus)
        return (min(p, self.host_gpus) - 1) * self.link_latency + math.log2(hosts) * self.network_latency

    def all_gather(self, n_bytes: float, p: int) -> float:
        """n_bytes: of the whole; a reduce-scatter takes as long, an all-reduce is one of each."""
        return (p - 1) / p * n_bytes / self.bandwidth(p) + self.latency(p)

    def all_to_all(self, n_bytes: float, p: int) -> float:
        """n_bytes: of one GPU. Each sends (p - 1) / p of it; what leaves the host goes through the GPU's own adapter alone."""
        inside, speed = (1, self.link) if p <= self.host_gpus else (self.host_gpus, self.network)
        return (p - inside) / p * n_bytes / speed + self.latency(p)


@dataclass(frozen=True)
class Job:
    """A GPT with a table and a head of its own under Muon (the matrices) and AdamW (these two)."""

    layers: int
    width: int
    vocab: int = 50_304
    context: int = 1024

    @property
    def matrices(self) -> int:
        return 12 * self.layers * self.width**2

    @property
    def parameters(self) -> int:
        return self.matrices + 2 * self.vocab * self.width

    @property
    def flops_per_token(self) -> float:
        return 6.0 * (self.matrices + self.vocab * self.width) + 12.0 * self.layers * self.width * self.context

    def muon_seconds(self, machine: Machine, p: int) -> float:
        """The busiest GPU's Newton-Schulz, five times 4m²n + 2m³: whole parameters are dealt out, per layer four matrices m × m and two m × 4m."""
        return -(-self.layers // p) * 5 * (4 * 6 + 2 * 18) * self.width**3 / (machine.peak_flops * machine.ns_mfu)


@dataclass(frozen=True)
class Step:
    """Seconds of one step's parts; `exchange` is all that travels, `waited` what no computing hides."""

    compute: float
    optimizer: float
    exchange: float = 0.0
    waited: float = 0.0
    slowed: float = 0.0

    @property
    def seconds(self) -> float:
        return self.compute + self.optimizer + self.waited + self.slowed


def predict(
    job: Job, machine: Machine, p: int, tokens: int, parallel: str = "ddp", per_token: float = 0, other: float = 0
) -> Step:
    """One step of p GPUs with `tokens` tokens each. Measured seconds, where there are some: per_token of forward and backward,
    other of the optimizer without Newton-Schulz."""
    compute = tokens * (per_token or job.flops_per_token / (machine.peak_flops * machine.mfu))
    # AdamW reads four numbers a parameter and writes three; Muon's momentum moves as many.
    other = other or 28 * job.parameters / machine.memory_speed
    optimizer = other / (p if parallel == "fsdp" else 1) + job.muon_seconds(machine, p)
    if p == 1:
        return Step(compute, optimizer)
    n, table = job.parameters, job.vocab * job.width
    if parallel == "ddp":  # float32 gradients; the table's are ready last
        ahead, behind = 0.0, 2 * machine.all_gather(4 * n, p)
        edges = 2 * machine.all_gather(4 * table, p)
        muon = machine.all_gather(2 * job.matrices, p)
    else:  # bf16 weights, forward and backward; float32 gradients. Table and head are gathered first and summed last
        ahead, behind = machine.all_gather(2 * n, p), machine.all_gather(2 * n, p) + machine.all_gather(4 * n, p)
        edges = machine.all_gather(2 * 2 * table, p) + machine.all_gather(4 * 2 * table, p)
        muon = 2 * machine.all_to_all(2 * job.matrices / p, p)
    during = ahead + behind
    waited = max(0.0, ahead - compute / 3) + max(0.0, behind - 2 / 3 * compute) + edges
    return Step(compute, optimizer, during + muon, min(waited, during) + muon, machine.contention * min(during, compute))


def efficiency(job: Job, machine: Machine, p: int, alone: int, each: int, parallel: str = "ddp") -> float:
    """Speed of p GPUs with `each` tokens over p times that of one with `alone`: as many (weak), or p times as many (strong)."""
    return each / alone * predict(job, machine, 1, alone).seconds / predict(job, machine, p, each, parallel).seconds


def break_even_tokens(machine: Machine, p: int, parallel: str) -> float:
    """Tokens a GPU below which exchange is longer than what it hides behind: the same for a model of any size, without attention.

    DDP: 4 bytes a parameter, twice, behind 4 FLOPs a parameter and token. FSDP: 2 + 2 + 4 bytes behind 6 FLOPs.
    """
    return (p - 1) / p * machine.peak_flops * machine.mfu / machine.bandwidth(p) * 8 / (4 if parallel == "ddp" else 6)


GPT2 = Job(12, 768)


def from_records(records: list[dict[str, Any]]) -> tuple[Machine, dict[str, float]]:
    """What one GPU and the links measured: a pass has no share in what two batches of one GPU cost alike."""
    weak, strong = ({r["kind"]: r for r in records if r["processes"] == 1}[kind] for kind in ("weak", "strong"))
    small, large = (statistics.median(r["step_ms"]) / 1e3 for r in (weak, strong))
    per_token = (large - small) / (strong["tokens_per_step"] - weak["tokens_per_step"])
    peak = weak["peak_flops"] or Machine.peak_flops
    machine = Machine(peak_flops=peak, mfu=weak["flops_per_token"] / per_token / peak)
    if links := [r for r in records if r["kind"] == "links"]:
        most = max(links, key=lambda r: r["processes"])
        latency = 1e-6 * most["tiny_us"] / (2 * (most["processes"] - 1))
        machine = replace(machine, link=1e9 * most["bus_gb_per_second"], link_latency=latency)
    other = small - per_token * weak["tokens_per_step"] - GPT2.muon_seconds(machine, 1)
    return machine, {"per_token": per_token, "other": max(1e-9, other)}


def predict_record(record: dict[str, Any], machine: Machine, measured: dict[str, float]) -> Step:
    count = record["processes"]
    return predict(GPT2, machine, count, record["tokens_per_step"] // count, record["parallel"], **measured)


def fit_contention(machine: Machine, measured: dict[str, float], points: list[dict[str, Any]]) -> Machine:
    """The one number that is fitted, to the weak DDP point of the most GPUs; all other points check it."""
    weak = [r for r in points if (r["kind"], r["parallel"]) == ("weak", "ddp")]
    if not weak:
        return machine
    most = max(weak, key=lambda r: r["processes"])
    slow = predict_record(most, replace(machine, contention=1.0), measured)
    plain = slow.compute + slow.optimizer + slow.waited
    return replace(machine, contention=max(0.0, (statistics.median(most["step_ms"]) / 1e3 - plain) / slow.slowed))


def tables(machine: Machine) -> str:
    """Markdown: efficiencies by number of GPUs, and where each way stops paying."""
    counts, ways = (1, 2, 4, 8, 16, 32, 64), ("ddp", "fsdp")
    lines = [
        "| GPUs | weak, 64 × 1024 tokens each: DDP | FSDP | strong, 512 × 1024 in all: DDP | FSDP | tokens each: DDP needs | FSDP needs |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in counts:
        pairs = ((64 * 1024, 64 * 1024), (512 * 1024, 512 * 1024 // p))  # tokens of one GPU alone, of each of several
        cells = [f"{100 * efficiency(GPT2, machine, p, *tokens, way):.1f} %" for tokens in pairs for way in ways]
        cells += [f"{break_even_tokens(machine, p, way):,.0f}" for way in ways]
        lines.append(f"| {p} | {' | '.join(cells)} |")
    # A number of a square matrix is sooner sent (2 bytes) than made orthogonal again (30·m FLOPs).
    width = 2 / machine.bandwidth(8) * machine.peak_flops * machine.ns_mfu / 30
    shared = ", ".join(f"{1e3 * GPT2.muon_seconds(machine, p):.1f} ms on {p if p > 1 else 'one GPU'}" for p in counts)
    lines += [
        "",
        f"Newton-Schulz of GPT-2 124M: {shared}. Sharing it pays from width {width:.0f} on within a host.",
        "",
        "| model | parameters | GPUs that hold it: DDP | FSDP | 64 GPUs, FSDP, 8 × 1024 tokens each: forward and backward | waited for |",
        "|---|---|---|---|---|---|",
    ]
    for job in (GPT2, Job(24, 2048), Job(32, 4096), Job(80, 8192)):
        # 16 bytes a parameter (weight, gradient, two moments) in 60 % of the memory; the rest is activations'.
        needed, step = math.ceil(16 * job.parameters / (0.6 * machine.memory)), predict(job, machine, 64, 8 * 1024, "fsdp")
        lines.append(
            f"| {job.layers} × {job.width} | {job.parameters / 1e9:.2f} B | {'1' if needed == 1 else 'none'} | {needed} | "
            f"{100 * step.compute / step.seconds:.0f} % of a step | {1e3 * step.waited:.1f} of {1e3 * step.seconds:.0f} ms |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", help="a file with the last line of benchmarks/scaling.py")
    args = parser.parse_args()
    machine = Machine()
    if args.result is not None:
        records = json.loads(args.result.read_text(encoding="utf-8").splitlines()[-1])["records"]
        machine, measured = from_records(records)
        points = [r for r in records if r["kind"] in ("weak", "strong") and r["processes"] > 1]
        machine = fit_contention(machine, measured, points)
        print("| kind | GPUs | | measured, ms | model, ms | model / measured |\n|---|---|---|---|---|---|")
        for r in points:
            ms, model = statistics.median(r["step_ms"]), 1e3 * predict_record(r, machine, measured).seconds
            print(f"| {r['kind']} | {r['processes']} | {r['parallel']} | {ms:.1f} | {model:.1f} | {model / ms:.3f} |")
        print()
    print(
        f"MFU {100 * machine.mfu:.0f} %, link {machine.link / 1e9:.0f} GB/s, contention {machine.contention:.2f}\n\n{tables(machine)}"
    )


if __name__ == "__main__":
    main()

"""The arithmetic of scaling.md: what training on p GPUs should cost, from computing, bandwidth and latency.

    python docs/scaling_model.py                      # an H100 host by its data sheet: 1 to 64 GPUs, as Markdown
    python docs/scaling_model.py RESULT.json          # from one GPU's measured steps; measured points beside the model's

RESULT.json holds the last line of benchmarks/scaling.py. An exchange of n bytes among p GPUs takes (2 (p - 1) / p) · n / bandwidth +
latency for an all-reduce, half of that for an all-gather, a reduce-scatter or an all-to-all of n bytes in all (Thakur et al. 2005; the
factors of nccl-tests). Exchanges run beside the pass they belong to; what is longer than that pass is waited for, and while they
run they slow it down by `contention`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """Hosts of one kind. Bandwidths are of one GPU and one direction, bytes a second; latencies of one step between two GPUs, seconds."""

    peak_flops: float = 989e12  # H100 SXM, bf16, dense (data sheet)
    memory: float = 80e9  # bytes
    memory_speed: float = 3.35e12  # bytes a second
    mfu: float = 0.5  # share of it that forward and backward reach on one GPU: an assumption until measured
    host_gpus: int = 8
    link: float = 0.8 * 450e9  # NVLink 4: 900 GB/s both ways (data sheet); 0.8: an assumption until measured
    network: float = 0.8 * 50e9  # one 400 Gb/s adapter a GPU (DGX H100)
    link_latency: float = 3e-6  # assumptions until measured
    network_latency: float = 10e-6
    contention: float = 0.0

    def bandwidth(self, p: int) -> float:
        """Of a ring through p GPUs: beyond one host every GPU's own adapter carries a ring, eight of them share the work."""
        return self.link if p <= self.host_gpus else min(self.link, self.host_gpus * self.network)

    def latency(self, p: int) -> float:
        """Of one all-reduce: a ring within a host, a double tree between hosts (NCCL's choice for small messages)."""
        if p == 1:
            return 0.0
        hosts = -(-p // self.host_gpus)
        within = 2 * (min(p, self.host_gpus) - 1) * self.link_latency
        return within + 2 * math.log2(hosts) * self.network_latency

    def all_reduce(self, n_bytes: float, p: int) -> float:
        return 2 * (p - 1) / p * n_bytes / self.bandwidth(p) + self.latency(p)

    def all_gather(self, n_bytes: float, p: int) -> float:
        """n_bytes: of the whole; a reduce-scatter takes as long."""
        return (p - 1) / p * n_bytes / self.bandwidth(p) + self.latency(p) / 2

    def all_to_all(self, n_bytes: float, p: int) -> float:
        """n_bytes: of one GPU. Each sends (p - 1) / p of it; what leaves the host goes through the GPU's own adapter alone."""
        if p <= self.host_gpus:
            return (p - 1) / p * n_bytes / self.link + self.latency(p) / 2
        return (p - self.host_gpus) / p * n_bytes / self.network + self.latency(p) / 2


@dataclass(frozen=True)
class Job:
    """A GPT under Muon and AdamW. `stacks`: (parameters, matrices in each, rows, columns) of what Muon makes orthogonal."""

    layers: int
    width: int
    vocab: int
    context: int
    ns_mfu: float = 0.5  # share of the peak that Newton-Schulz reaches: an assumption

    @property
    def stacks(self) -> list[tuple[int, int, int, int]]:
        L, C = self.layers, self.width
        return [(L, 3, C, C), (L, 1, C, C), (L, 1, 4 * C, C), (L, 1, C, 4 * C)]

    @property
    def matrix_parameters(self) -> int:
        return sum(n * splits * rows * columns for n, splits, rows, columns in self.stacks)

    @property
    def parameters(self) -> int:
        """With a table and a head of its own."""
        return self.matrix_parameters + 2 * self.vocab * self.width

    @property
    def flops_per_token(self) -> float:
        """6N + 12·L·C·T (Chowdhery et al. 2022)."""
        n = self.matrix_parameters + self.vocab * self.width
        return 6.0 * n + 12.0 * self.layers * self.width * self.context

    def muon_seconds(self, machine: Machine, p: int) -> float:
        """The busiest GPU's Newton-Schulz: five times three products of the smaller side m, 4m²n + 2m³ FLOPs; whole parameters are dealt out."""
        total = 0.0
        for n, splits, rows, columns in self.stacks:
            m, wide = min(rows, columns), max(rows, columns)
            total += -(-n // p) * splits * 5 * (4 * m * m * wide + 2 * m**3)
        return total / (machine.peak_flops * self.ns_mfu)


COUNTS = (1, 2, 4, 8, 16, 32, 64)  # GPUs, in the page's tables
GPT2 = Job(layers=12, width=768, vocab=50_304, context=1024)
MODELS = {
    "12 × 768": GPT2,
    "24 × 2048": Job(layers=24, width=2048, vocab=50_304, context=1024),
    "32 × 4096": Job(layers=32, width=4096, vocab=50_304, context=1024),
    "80 × 8192": Job(layers=80, width=8192, vocab=50_304, context=1024),
}


@dataclass(frozen=True)
class Step:
    """Seconds of one step and of its parts; `exchange` is all that travels, `waited` what no computing hides."""

    compute: float
    optimizer: float
    exchange: float
    waited: float
    slowed: float

    @property
    def seconds(self) -> float:
        return self.compute + self.optimizer + self.waited + self.slowed


def predict(
    job: Job,
    machine: Machine,
    p: int,
    tokens: int,
    parallel: str = "ddp",
    compute: float | None = None,
    other: float | None = None,
) -> Step:
    """One step of p GPUs with `tokens` tokens each. compute: measured seconds of forward and backward; other: of the optimizer without
    Newton-Schulz; without them the data sheet's."""
    if compute is None:
        compute = job.flops_per_token * tokens / (machine.peak_flops * machine.mfu)
    if other is None:  # AdamW reads four numbers a parameter and writes three; Muon's momentum moves as many
        other = 28 * job.parameters / machine.memory_speed
    optimizer = other / (p if parallel == "fsdp" else 1) + job.muon_seconds(machine, p)
    if p == 1:
        return Step(compute, optimizer, 0.0, 0.0, 0.0)
    backward, forward = 2 / 3 * compute, 1 / 3 * compute
    table = job.vocab * job.width
    n = job.parameters
    if parallel == "ddp":  # float32 gradients; the table's are ready last
        during = machine.all_reduce(4 * n, p)
        waited = max(0.0, during - backward) + machine.all_reduce(4 * table, p)
        muon = machine.all_gather(2 * job.matrix_parameters, p)
    else:  # bf16 weights, forward and backward; float32 gradients. Table and head are gathered first and summed last
        ahead, behind = machine.all_gather(2 * n, p), machine.all_gather(2 * n, p) + machine.all_gather(4 * n, p)
        during = ahead + behind
        edges = machine.all_gather(2 * 2 * table, p) + machine.all_gather(4 * 2 * table, p)
        waited = max(0.0, ahead - forward) + max(0.0, behind - backward) + edges
        muon = 2 * machine.all_to_all(2 * job.matrix_parameters / p, p)
    waited = min(waited, during) + muon
    return Step(compute, optimizer, during + muon, waited, machine.contention * min(during, compute))


def weak_efficiency(job: Job, machine: Machine, p: int, tokens: int, parallel: str = "ddp") -> float:
    """Speed of p GPUs over p times that of one GPU with as many tokens."""
    return predict(job, machine, 1, tokens).seconds / predict(job, machine, p, tokens, parallel).seconds


def strong_efficiency(job: Job, machine: Machine, p: int, total: int, parallel: str = "ddp") -> float:
    """Speed of p GPUs over p times that of one GPU, with `total` tokens in all. Small batches are computed as well as large ones here."""
    return predict(job, machine, 1, total).seconds / p / predict(job, machine, p, total // p, parallel).seconds


def largest_parameters(machine: Machine, p: int, parallel: str) -> float:
    """What fits in 60 % of the memory at 16 bytes a parameter (weight, gradient, two moments); the rest is activations'."""
    return 0.6 * machine.memory / 16 * (p if parallel == "fsdp" else 1)


def break_even_tokens(machine: Machine, p: int, parallel: str) -> float:
    """Tokens a GPU below which exchange is longer than what it hides behind: the same for a model of any size, without attention.

    DDP: 4 bytes a parameter, twice, behind 4 FLOPs a parameter and token. FSDP: 2 + 2 + 4 bytes behind 6 FLOPs.
    """
    speed, share = machine.peak_flops * machine.mfu / machine.bandwidth(p), (p - 1) / p
    return share * speed * (8 / 4 if parallel == "ddp" else 8 / 6)


def smallest_width(machine: Machine, p: int) -> float:
    """Width from which a matrix is sooner sent (2 bytes a number) than made orthogonal again: 30·m FLOPs a number of a square one."""
    return 2 / machine.bandwidth(p) * machine.peak_flops * Job.ns_mfu / 30


def from_records(records: Sequence[Record]) -> tuple[Machine, dict[str, float]]:
    """What one GPU and the links measured; seconds of a pass over the smaller batch and of everything else, from two batches."""
    one = {r["kind"]: r for r in records if r["processes"] == 1 and "step_ms" in r}
    small, large = (statistics.median(one[kind]["step_ms"]) / 1e3 for kind in ("weak", "strong"))
    ratio = one["strong"]["tokens_per_step"] / one["weak"]["tokens_per_step"]
    compute = (large - small) / (ratio - 1)
    peak = one["weak"]["peak_flops"] or Machine.peak_flops
    mfu = one["weak"]["flops_per_token"] * one["weak"]["tokens_per_step"] / compute / peak
    machine = Machine(peak_flops=peak, mfu=mfu)
    links = [r for r in records if r["kind"] == "links"]
    if links:
        most = max(links, key=lambda r: r["processes"])
        machine = replace(
            machine, link=1e9 * most["bus_gb_per_second"], link_latency=1e-6 * most["tiny_us"] / (2 * (most["processes"] - 1))
        )
    muon = GPT2.muon_seconds(machine, 1)
    facts = {"compute": compute, "tokens": one["weak"]["tokens_per_step"], "other": max(0.0, small - compute - muon)}
    return machine, facts


def measured_points(records: Sequence[Record]) -> list[tuple[str, int, str, int, float]]:
    """(weak or strong, GPUs, ddp or fsdp, tokens a GPU, seconds) of every speed with several GPUs."""
    several = [r for r in records if r["kind"] in ("weak", "strong") and r["processes"] > 1]
    middles = [statistics.median(r["step_ms"]) / 1e3 for r in several]
    tokens = [r["tokens_per_step"] // r["processes"] for r in several]
    return [
        (r["kind"], r["processes"], r["parallel"], share, seconds)
        for r, share, seconds in zip(several, tokens, middles, strict=True)
    ]


def fit_contention(machine: Machine, facts: dict[str, float], points: Sequence[tuple[str, int, str, int, float]]) -> Machine:
    """The one number that is fitted, to the weak DDP point of the most GPUs; all other points check it."""
    weak = [point for point in points if point[0] == "weak" and point[2] == "ddp"]
    if not weak:
        return machine
    _, p, parallel, tokens, seconds = max(weak, key=lambda point: point[1])
    compute = facts["compute"] * tokens / facts["tokens"]
    plain, slow = (
        predict(GPT2, replace(machine, contention=contention), p, tokens, parallel, compute, facts["other"])
        for contention in (0.0, 1.0)
    )
    return replace(machine, contention=max(0.0, (seconds - plain.seconds) / slow.slowed))


def tables(machine: Machine) -> str:
    """Markdown: efficiencies by number of GPUs, and where each way stops paying."""
    lines = [
        "| GPUs | weak, 64 × 1024 tokens each: DDP | FSDP | strong, 512 × 1024 in all: DDP | FSDP | tokens each: DDP needs | FSDP needs |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in COUNTS:
        cells = [weak_efficiency(GPT2, machine, p, 64 * 1024, parallel) for parallel in ("ddp", "fsdp")]
        cells += [strong_efficiency(GPT2, machine, p, 512 * 1024, parallel) for parallel in ("ddp", "fsdp")]
        needs = [break_even_tokens(machine, p, parallel) for parallel in ("ddp", "fsdp")]
        lines.append(
            f"| {p} | " + " | ".join(f"{100 * c:.1f} %" for c in cells) + " | " + " | ".join(f"{n:,.0f}" for n in needs) + " |"
        )
    lines += [
        "",
        f"Newton-Schulz of GPT-2 124M: {1e3 * GPT2.muon_seconds(machine, 1):.1f} ms on one GPU, "
        + ", ".join(f"{1e3 * GPT2.muon_seconds(machine, p):.1f} ms on {p}" for p in COUNTS if p > 1)
        + f". Sharing it pays from width {smallest_width(machine, 8):.0f} on within a host.",
    ]
    lines += [
        "",
        "| model | parameters | GPUs that hold it: DDP | FSDP | 64 GPUs, FSDP, 8 × 1024 tokens each: forward and backward | waited for |",
        "|---|---|---|---|---|---|",
    ]
    for name, job in MODELS.items():
        needed = -(-job.parameters // largest_parameters(machine, 1, "ddp"))
        step = predict(job, machine, 64, 8 * 1024, "fsdp")
        lines.append(
            f"| {name} | {job.parameters / 1e9:.2f} B | {'1' if needed == 1 else 'none'} | {needed:.0f} | "
            f"{100 * step.compute / step.seconds:.0f} % of a step | {1e3 * step.waited:.1f} of {1e3 * step.seconds:.0f} ms |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", help="a file with the last line of benchmarks/scaling.py")
    args = parser.parse_args()
    machine = Machine()
    if args.result is not None:
        records = json.loads(args.result.read_text(encoding="utf-8").splitlines()[-1])["records"]
        machine, facts = from_records(records)
        points = measured_points(records)
        machine = fit_contention(machine, facts, points)
        print("| kind | GPUs | | measured, ms | model, ms | model / measured |\n|---|---|---|---|---|---|")
        for kind, p, parallel, tokens, seconds in points:
            compute = facts["compute"] * tokens / facts["tokens"]
            step = predict(GPT2, machine, p, tokens, parallel, compute, facts["other"])
            ratio = step.seconds / seconds
            print(f"| {kind} | {p} | {parallel} | {1e3 * seconds:.1f} | {1e3 * step.seconds:.1f} | {ratio:.3f} |")
        print()
    print(f"MFU {100 * machine.mfu:.0f} %, link {machine.link / 1e9:.0f} GB/s, contention {machine.contention:.2f}\n")
    print(tables(machine))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""GPT-2 124M on 1, 2, 4 … GPUs of one host: speed, what exchange costs, equal losses, and a model that one GPU does not hold.

    python benchmarks/scaling.py                               # all GPUs of the host, random tokens; about 5 minutes on 4 H200
    python benchmarks/scaling.py --counts 1 2 --set train.optimizer=adamw
    python benchmarks/scaling.py --shards DIR                  # tokens of a shard set (`gptloom data` makes one)
    python benchmarks/scaling.py --smoke                       # no GPU: a toy over gloo, to see whether it works

Weak: a fixed batch a GPU. Strong: a fixed batch over all. Each with DDP and with FSDP2, as `gptcore.train` steps. The communication
share is 1 − (time of the same work without any exchange) / (time of the step), all GPUs at work in both; the former has the whole
model on each GPU, so what FSDP2 saves by its smaller AdamW step counts in its favour. One GPU runs compiled as a whole, as it does by
default; several run compiled block by block, which rounds in other places. So losses, those of the first steps of the fixed batch, are
held against one GPU compiled block by block; how far that is from one compiled as a whole, and bf16 from float32, is told beside it.
Environment variables reach every process as they are: where NVLink multicast must stay off, set NCCL_NVLS_ENABLE=0,
TORCH_SYMM_MEM_DISABLE_MULTICAST=1 and NVSHMEM_DISABLE_NVLS=1. Progress goes to stderr; the last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from figures import figure, print_figures, say
from ours import ROOT, make_toy_shards

from gptcore.entry import python_environment

WEAK_GOAL = {2: 95.0, 8: 90.0}  # % of one GPU's speed, by number of GPUs
LOSS_TOLERANCE = 0.02  # nats: bf16 keeps 8 bits, and sums in another order part the runs a little more with every step
Record = dict[str, Any]

GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "padded_vocab_size": 50_304}
FULL: Record = {
    "model": GPT2,
    "train": {"device": "cuda", "precision": "bf16"},
    # 600M parameters: 9.0 GiB of weights, gradients and optimizer state, more than a tenth of an H100
    "large": {"model": {"n_layer": 24, "n_head": 20, "n_embd": 1280}, "memory_fraction": 0.1},
    # Half a million tokens a step on 8 GPUs, as GPT-2 is trained by nanoGPT
    **{"weak_batch": 64, "strong_batch": 128, "micro_batch": 64, "steps": 8, "repeats": 5, "losses": 12, "ids_learnt": 256},
}
SMOKE: Record = {
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "padded_vocab_size": 64},
    "train": {"device": "cpu", "precision": "fp32", "warmup_steps": 0, "lr": 0.05},
    "large": {"model": {"n_embd": 64}, "memory_fraction": 0.1, "simulated_mib": 1.1},
    **{"weak_batch": 4, "strong_batch": 8, "micro_batch": 4, "steps": 2, "repeats": 2, "losses": 6, "ids_learnt": 8},
}


def launch(plan: Record, count: int, folder: Path, limit_s: float) -> tuple[list[Record], str | None]:
    """What `count` processes told, and what went wrong, if anything did; they are gone after `limit_s` seconds."""
    path = folder / f"plan-{count}.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    # The port is the kernel's choice: two benchmarks of one host do not meet.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    threads = "1" if plan["train"]["device"] == "cpu" else "8"
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "OMP_NUM_THREADS": threads} | python_environment()
    pipes: Record = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    start, told, lines = time.perf_counter(), [], []
    command += [str(ROOT / "benchmarks" / "scaling_process.py"), str(path)]
    process = subprocess.Popen(command, **pipes, env=environment, cwd=ROOT, start_new_session=True)
    timer = threading.Timer(limit_s, process.terminate)  # torchrun passes it on
    timer.start()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith('{"kind"'):
                told.append(json.loads(line))
                say(f"{time.perf_counter() - start:6.1f} s  {describe(told[-1])}")
            else:
                lines.append(line)
    finally:
        timer.cancel()
        if process.poll() is None:
            process.terminate()
    if process.wait() == 0:
        return told, None
    errors = [line.strip() for line in lines if "Error" in line or line.startswith("error:")]
    say("".join(lines[-60:]))
    return told, (errors or [f"ended with code {process.returncode}"])[0][:500]


def describe(record: Record) -> str:
    """One line for people."""
    text = f"{record['processes']} x {record.get('parallel', '')} {record['kind']}:"
    if "step_ms" in record:
        text += f" {statistics.median(record['step_ms']):.1f} ms a step"
    if "tokens_per_step" in record:
        text += f", {statistics.median(speeds(record)):,.0f} tok/s, MFU {mfu(record)} %, {record['peak_mib']:,} MiB"
    if "losses" in record:
        text += f" losses {record['losses'][0]:.4f} … {record['losses'][-1]:.4f}"
    if "bus_gb_per_second" in record:
        text += f" {record['bus_gb_per_second']:.0f} GB/s, {record['tiny_us']:.0f} us"
    return text + (f" refused: {record['refused']}" if "refused" in record else "")


def largest_gap(one: Record, other: Record) -> float:
    """Between the losses of any step, in nats."""
    return max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))


def speeds(record: Record) -> list[float]:
    """Tokens a second of all GPUs together, one figure a repeat."""
    return [record["tokens_per_step"] / (ms / 1e3) for ms in record["step_ms"]]


def mfu(record: Record) -> float | None:
    """Percent of the bf16 peak of all GPUs; None for a device without a data sheet."""
    if record["peak_flops"] is None:
        return None
    per_gpu = statistics.median(speeds(record)) / record["processes"]
    return round(100 * record["flops_per_token"] * per_gpu / record["peak_flops"], 2)


def build_figures(records: list[Record]) -> list[Record]:
    """Speeds, efficiencies, shares of communication and distances of losses, as benchmarks print them."""
    found = []
    by_kind = {(r["kind"], r["processes"], r.get("parallel", "ddp")): r for r in records}
    whole, in_parts = (by_kind.get((kind, 1, "ddp")) for kind in ("losses", "losses in parts"))
    for (kind, count, parallel), record in by_kind.items():
        label = f"{count} GPU{'s' if count > 1 else ''}{f', {parallel}' if count > 1 else ''}"
        if kind in ("weak", "strong"):
            one, silent = by_kind.get((kind, 1, "ddp")), by_kind.get((f"{kind} without exchange", count, "ddp"))
            peer = speeds(one) if one is not None and count > 1 else None
            made = figure(f"{kind}: {label}", "tok/s", speeds(record), peer=peer, digits=0)
            found.append(made | {"mfu_percent": mfu(record), "peak_mib": record["peak_mib"]})
            if peer is not None:
                shares = [100 * speed / (statistics.median(peer) * count) for speed in speeds(record)]
                goal = WEAK_GOAL.get(count) if (kind, parallel) == ("weak", "ddp") else None
                name = f"{kind} efficiency: {label}"
                found.append(figure(name, "%", shares, goal=goal, goal_is="at least", of="mean", digits=2))
            if silent is not None:
                shares = [100 * (1 - statistics.median(silent["step_ms"]) / ms) for ms in record["step_ms"]]
                found.append(figure(f"{kind} communication share: {label}", "% of a step", shares, digits=2))
        if kind == "losses" and count > 1 and in_parts is not None:
            gap = largest_gap(record, in_parts)
            found.append(figure(f"largest distance to one GPU's losses: {label}", "nats", [gap], goal=LOSS_TOLERANCE))
        if kind == "losses in fp32" and in_parts is not None and whole is not None:
            name = "largest distance of losses on one GPU:"
            found.append(figure(f"{name} compiled whole and in parts", "nats", [largest_gap(whole, in_parts)]))
            found.append(figure(f"{name} compiled whole and in float32", "nats", [largest_gap(whole, record)]))
            found.append(figure(f"{name} compiled in parts and in float32", "nats", [largest_gap(in_parts, record)]))
        if kind == "links":
            found.append(figure(f"all-reduce bus bandwidth: {label}", "GB/s", [record["bus_gb_per_second"]]))
        if kind == "large":
            made = figure(f"large model, part of the memory: {label}", "tok/s", speeds(record), digits=0)
            found.append(made | {"peak_mib": record["peak_mib"], "parameters": record["parameters"]})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", help="numbers of GPUs (default: 1, 2, 4, 8 as far as there are)")
    parser.add_argument("--parallel", nargs="+", default=["ddp", "fsdp"], choices=["ddp", "fsdp"])
    parser.add_argument("--shards", type=Path, help="a shard set to read (default: random tokens)")
    parser.add_argument("--memory-fraction", type=float, default=0.1, help="of a GPU, for the large model; 0: leave it out")
    parser.add_argument("--steps", type=int, help="steps of a repeat")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--limit", type=float, default=400.0, help="seconds for everything; what does not fit is left out")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.field=value", help="changes to the config")
    parser.add_argument("--smoke", action="store_true", help="a toy on the CPU, 1 and 2 processes")
    args = parser.parse_args()
    start = time.perf_counter()
    plan = json.loads(json.dumps(SMOKE if args.smoke else FULL))
    plan |= {key: getattr(args, key) for key in ("steps", "repeats") if getattr(args, key)}
    plan |= {"parallel": args.parallel, "given_tokens": args.shards is not None}
    plan["large"]["memory_fraction"] = args.memory_fraction
    for change in args.set:
        key, _, value = change.partition("=")
        section, field = key.split(".")
        plan[section][field] = value
    there = 2 if args.smoke else torch.cuda.device_count()
    counts = args.counts or [count for count in (1, 2, 4, 8) if count <= there]
    if not args.smoke and max(counts) > there:
        parser.error(f"--counts {max(counts)}: there are {there} GPUs here; give smaller counts, or --smoke")
    records: list[Record] = []
    troubles: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="gptloom-bench-") as name:
        folder = Path(name)
        plan["shards"] = str(args.shards.resolve() if args.shards else make_toy_shards(folder))
        # One GPU first, for all else is held against it; then the most, in case time runs out.
        for count in sorted(counts, key=lambda count: (count > 1, -count)):
            left = args.limit - (time.perf_counter() - start)
            if left < 20:
                troubles[str(count)] = "left out: no time"
                continue
            is_end = count in (1, max(counts)) and args.memory_fraction
            told, trouble = launch({**plan, "large": plan["large"] if is_end else None}, count, folder, left)
            records += told
            if trouble:
                troubles[str(count)] = trouble
                say(f"{count} process(es): {trouble}")
    print_figures(
        build_figures(records),
        records=records,
        devices=sorted({r["device"] for r in records if "device" in r}),
        large_on_one_gpu=next((r["refused"] for r in records if r["kind"] == "large on one"), None),
        troubles=troubles,
        seconds=round(time.perf_counter() - start, 1),
    )
    return 1 if troubles else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""One process of benchmarks/scaling.py, which starts it under torchrun: measures what its plan says. A module, not a script.

torchrun --nproc-per-node=N benchmarks/scaling_process.py PLAN.json

The first process prints one line `{"kind": …}` for each thing measured, as soon as it is.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gptcore.config import UserError, check_config
from gptcore.device import Device
from gptcore.ranks import ALONE, Ranks, joined_ranks
from gptcore.shards import ShardSet
from gptcore.timing import measure_ms
from gptcore.train import Trainer, build_trainer, train_step
from gptcore.train.distribute import compile_parts
from gptcore.train.step import backward_all, next_batch


class Silent(Ranks):
    """A process's place among others whom it neither tells nor hears: the same work without any exchange. What it computes is no training."""

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def from_first(self, value: float) -> float:
        return value

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor] * self.count

    def start_gather(self, part: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return part.repeat(self.count, *[1] * (part.dim() - 1)), self  # whose `wait` returns at once


class RandomTokens:
    """A sampler of uniformly random ids below `high`; sample i is a function of i, or, where that is too slow, a batch is of its start."""

    def __init__(self, device: Device, block_size: int, high: int, *, by_sample: bool) -> None:
        self.device, self.length, self.high, self.by_sample = device.torch, block_size + 1, high, by_sample

    def batch(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        draws = [(number, 1) for number in range(start, start + count)] if self.by_sample else [(start, count)]
        ids = torch.cat([self._draw(*draw) for draw in draws]).to(self.device)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def _draw(self, seed: int, count: int) -> torch.Tensor:
        device = "cpu" if self.by_sample else self.device
        rng = torch.Generator(device).manual_seed(seed)
        return torch.randint(self.high, (count, self.length), device=device, generator=rng)


class ScalingBench:
    """Trainers of one plan, built, timed and thrown away one after the other."""

    def __init__(self, plan: dict[str, Any], ranks: Ranks) -> None:
        self.plan, self.ranks = plan, ranks
        self.shards = ShardSet.open(Path(plan["shards"]))
        self.given = plan["given_tokens"]

    def tell(self, kind: str, **values: Any) -> None:
        if self.ranks.is_first:
            print(json.dumps({"kind": kind, "processes": self.ranks.count, **values}), flush=True)

    def build(self, parallel: str, batch: int, ranks: Ranks, **changes: Any) -> Trainer:
        sweep()  # of the trainer before
        train = {"parallel": parallel, "global_batch_size": batch, "max_steps": 100_000, **self.plan["train"]}
        train["micro_batch_size"] = min(self.plan["micro_batch"], batch // ranks.count)
        tree = {"model": self.plan["model"], "train": {**train, **changes}, "studies": {"accumulation": False}}
        trainer = build_trainer(check_config(tree), self.shards, ranks)
        self.draw(trainer, trainer.model.vocab_size, by_sample=False)
        return trainer

    def draw(self, trainer: Trainer, high: int, *, by_sample: bool) -> None:
        if not self.given:
            trainer.sampler = RandomTokens(trainer.device, trainer.config.model.block_size, high, by_sample=by_sample)

    def learn(self, trainer: Trainer) -> list[float]:
        """Losses of the first steps of the whole batch, in nats; the same samples for any number of processes.

        Only the first few ids appear in them, so the loss falls, and equal losses say something.
        """
        self.draw(trainer, self.plan["ids_learnt"], by_sample=True)
        losses = [train_step(trainer)[0] for _ in range(self.plan["losses"])]
        self.draw(trainer, trainer.model.vocab_size, by_sample=False)
        return [round(x, 6) for x in trainer.ranks.sum_(torch.stack(losses)).tolist()]

    def time(self, trainer: Trainer, warmup: int, step: Any = train_step) -> list[float]:
        """Milliseconds of a step, one figure a repeat, after `warmup` steps; as the training loop asks every step whether to stop."""
        found = []
        for repeat in range(self.plan["repeats"] + 1):
            self.ranks.wait()
            trainer.device.synchronize()
            start = time.perf_counter()
            steps = self.plan["steps"] if repeat else warmup
            for _ in range(steps):
                step(trainer)
                trainer.ranks.any(False)
            trainer.device.synchronize()
            if repeat:
                found.append(round(1e3 * (time.perf_counter() - start) / steps, 3))
        return found

    def facts(self, trainer: Trainer, step_ms: list[float]) -> dict[str, Any]:
        return {
            "step_ms": step_ms,
            "tokens_per_step": trainer.tokens_per_step,
            "flops_per_token": trainer.model.flops_per_token(),
            "parameters": trainer.model.count_parameters(),
            "peak_flops": trainer.device.peak_flops,
            "device": trainer.device.name,
            "peak_mib": round(trainer.device.peak_mib()),
        }


def without_exchange(trainer: Trainer) -> None:
    """A step of DDP that keeps its gradients to itself; everything else as ever."""
    x, y = next_batch(trainer)
    with trainer.forward.no_sync():
        backward_all(trainer, x, y)
    trainer.optimizers.step()
    trainer.optimizers.zero_grad()
    trainer.step += 1


def measure_speed(bench: ScalingBench) -> None:
    """Both batches under every way of being several, and the same work without any exchange."""
    plan, ranks = bench.plan, bench.ranks
    strong, weak = plan["strong_batch"], plan["weak_batch"] * ranks.count
    for parallel in plan["parallel"] if ranks.count > 1 else ["ddp"]:
        measure_strong(bench, parallel, strong, is_weak=weak == strong)
        if weak != strong:
            measure_weak(bench, parallel, weak)
    if ranks.count > 1:
        # Every GPU at once, as before, so that heat and the host's load are the same.
        measure_silent(bench, "strong without exchange", strong)
        if weak != strong:
            measure_silent(bench, "weak without exchange", weak)


# A function each, at whose end nothing holds the trainer any more.


def measure_strong(bench: ScalingBench, parallel: str, batch: int, *, is_weak: bool) -> None:
    trainer = bench.build(parallel, batch, bench.ranks)
    began = time.perf_counter()
    with trainer.device.attention(0.0):
        losses = bench.learn(trainer)
        bench.tell("losses", parallel=parallel, losses=losses, seconds=round(time.perf_counter() - began, 1))
        facts = bench.facts(trainer, bench.time(trainer, 3))  # once: reading the peak of memory sets it back
        for kind in ("strong", "weak") if is_weak else ("strong",):
            bench.tell(kind, parallel=parallel, **facts)
        if parallel == "ddp" and bench.ranks.count > 1:
            bench.tell("strong without gradient sync", step_ms=bench.time(trainer, 3, without_exchange))


def measure_weak(bench: ScalingBench, parallel: str, batch: int) -> None:
    trainer = bench.build(parallel, batch, bench.ranks)
    with trainer.device.attention(0.0):
        bench.tell("weak", parallel=parallel, **bench.facts(trainer, bench.time(trainer, 8)))


def measure_silent(bench: ScalingBench, kind: str, batch: int) -> None:
    """DDP's trainer, compiled block by block as it is, without DDP around it."""
    from gptcore.train import trainer as trainer_module

    real, trainer_module.distribute = trainer_module.distribute, never_synced
    try:
        trainer = bench.build("ddp", batch, Silent(bench.ranks.rank, bench.ranks.count, bench.ranks.local_rank))
    finally:
        trainer_module.distribute = real
    with trainer.device.attention(0.0):
        bench.tell(kind, step_ms=bench.time(trainer, 5))


def never_synced(model: Any, compiled: Any) -> Any:
    """A model's forward with the one other method of DDP that a step uses."""
    forward = partial(compiled)
    forward.no_sync = nullcontext  # type: ignore[attr-defined]
    return forward


def measure_rounding(bench: ScalingBench) -> None:
    """One GPU's losses with the model compiled in parts, as several GPUs have it, and in float32: what rounding alone does to them."""
    for kind, precision in {"losses in parts": bench.plan["train"]["precision"], "losses in fp32": "fp32"}.items():
        trainer = bench.build("ddp", bench.plan["strong_batch"], ALONE, compile="off", precision=precision)
        if kind == "losses in parts" and trainer.device.is_cuda:
            compile_parts(trainer.model)
        with trainer.device.attention(0.0):
            bench.tell(kind, losses=bench.learn(trainer))
        del trainer


def measure_links(bench: ScalingBench) -> None:
    """Bus bandwidth of a large all-reduce (2 (p - 1) / p of its bytes pass every link) and the time of a tiny one."""
    ranks, is_cuda = bench.ranks, torch.cuda.is_available()
    large, tiny = (torch.zeros(count, device="cuda" if is_cuda else "cpu") for count in (1 << (26 if is_cuda else 16), 256))
    synchronize = torch.cuda.synchronize if is_cuda else nullcontext
    seconds = measure_ms(partial(ranks.sum_, large), synchronize, 10, warmups=2).median / 1e3
    tiny_ms = measure_ms(partial(ranks.sum_, tiny), synchronize, 50, warmups=2).median  # ten once were ten hiccups of the host
    passed = 2 * (ranks.count - 1) / ranks.count * large.nbytes
    bus = round(passed / seconds / 1e9, 1)
    bench.tell("links", all_reduce_bytes=large.nbytes, bus_gb_per_second=bus, tiny_us=round(1e3 * tiny_ms, 1))


def measure_large(bench: ScalingBench) -> None:
    """A model that one GPU refuses, with a part of its memory: what is said there, and steps of it spread over several."""
    plan, ranks = bench.plan, bench.ranks
    large = plan["large"]
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(large["memory_fraction"])
    else:  # nothing limits a CPU's memory, so the smoke run only says that it is small
        Device.free_mib = lambda self: large["simulated_mib"]  # type: ignore[method-assign]
    bench.plan = {**plan, "model": {**plan["model"], **large["model"]}, "micro_batch": 1}
    if ranks.count == 1:
        refused = None
        try:
            bench.build("fsdp", 1, ALONE, compile="off")
        except UserError as error:
            refused = str(error)
        return bench.tell("large on one", refused=refused)
    trainer = bench.build("fsdp", ranks.count, ranks, compile="off")
    with trainer.device.attention(0.0):
        losses = bench.learn(trainer)
        step_ms = bench.time(trainer, 2)
    trainer.watch.check(trainer.step, 0.0)
    bench.tell("large", parallel="fsdp", losses=losses, **bench.facts(trainer, step_ms))


def sweep() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch._dynamo.config as dynamo

    dynamo.automatic_dynamic_shapes = False  # a second batch size is compiled as well as the first
    with joined_ranks() as ranks:
        bench = ScalingBench(plan, ranks)
        if ranks.count > 1:
            measure_links(bench)
        measure_speed(bench)
        if ranks.count == 1:
            measure_rounding(bench)
        if plan["large"] is not None:
            measure_large(bench)
        sweep()


if __name__ == "__main__":
    main()

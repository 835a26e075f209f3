"""Advice by rules: what to change, with the number that says so. A rule that is not triggered says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptcore.studies.timing.sections import TRAINING

# Shares of a step or of a run from which a rule speaks.
DATA, COPY, OPTIMIZER, CLIP = 0.05, 0.05, 0.20, 0.10
EVALUATE, SAVE, REPORT, COLLECT, COMPILE = 0.15, 0.05, 0.03, 0.02, 0.20
SMALL_PARTS = 0.30  # norm, loss, embedding: little arithmetic for their bytes
BUSY = 0.70  # of a step in which some kernel runs
LOW_PEAK = 0.30  # of the FLOP/s that one large product reaches
LAUNCH_US = 50.0  # per operator, where starting it is a large part of its time on a CPU
NOT_TRAINING = 0.50


def advise_step(facts: Mapping[str, Any], shares: Mapping[str, float]) -> list[str]:
    """For the inside of a step. facts: a row of the step table; shares: section → share of the step."""
    told = []

    def share(*names: str) -> float:
        return sum(value for section, value in shares.items() if section.split(" / ")[-1] in names)

    if (value := share("data")) > DATA:
        told.append(
            f"Waiting for data takes {_p(value)} of a step (rule: {_p(DATA)}): put the shards on a faster disk, or fewer, larger steps."
        )
    if (value := share("to_device")) > COPY:
        told.append(
            f"Copying to the device takes {_p(value)} of a step (rule: {_p(COPY)}): a corpus below 64 M tokens stays on the device by itself; else larger micro-batches."
        )
    if (value := share("optimizer")) > OPTIMIZER:
        told.append(
            f"The optimizer takes {_p(value)} of a step (rule: {_p(OPTIMIZER)}): a larger train.global_batch_size shares its cost among more tokens, train.optimizer=adamw has less to do."
        )
    if (value := share("clip")) > CLIP:
        told.append(
            f"Clipping takes {_p(value)} of a step (rule: {_p(CLIP)}): train.grad_clip=0 leaves it out, if the gradient norm stays calm."
        )
    if (value := share("norm", "loss", "embedding")) > SMALL_PARTS:
        told.append(
            f"Norms, embedding and loss take {_p(value)} of a step (rule: {_p(SMALL_PARTS)}): they move bytes and compute little; train.compile=on fuses them, a larger model.n_embd outweighs them."
        )
    busy = facts.get("busy_share")
    if busy is not None and busy < BUSY:
        told.append(
            f"A kernel runs in only {_p(busy)} of the step (rule: {_p(BUSY)}; {facts['kernels']:,} kernels): the GPU waits for its host; train.cuda_graph=on, train.compile=on or a larger micro-batch."
        )
    if busy is None and facts["us_per_operator"] < LAUNCH_US:
        told.append(
            f"An operator takes {facts['us_per_operator']:.0f} µs on average (rule: {LAUNCH_US:.0f} µs): starting it costs as much as its work; larger micro-batches, or a wider model."
        )
    if facts["of_peak"] < LOW_PEAK:
        where = "bandwidth" if facts["intensity"] < facts["ridge"] else "arithmetic"
        told.append(
            f"The step reaches {_p(facts['of_peak'])} of what one large product reaches here (rule: {_p(LOW_PEAK)}); with {facts['intensity']:.1f} FLOP a byte against a ridge of {facts['ridge']:.1f}, {where} is its roof."
        )
    return told


def advise_pipeline(shares: Mapping[str, float], not_training: float) -> list[str]:
    """For the whole pipeline. shares: first-level and train's second-level parts → share of the whole, all inside included."""
    told = []
    if not_training > NOT_TRAINING:
        largest = largest_other(shares)
        told.append(
            f"{_p(not_training)} of the time trains nothing (rule: {_p(NOT_TRAINING)}); the largest such part is {largest} with "
            f"{_p(shares[largest])}. Prepared data is found again by the next run; the rest shrinks against longer training."
        )
    for key, limit, way in (
        ("train / evaluate", EVALUATE, "raise train.eval_interval or lower train.eval_tokens"),
        ("train / save", SAVE, "raise train.save_interval"),
        ("train / report", REPORT, "raise train.log_interval"),
        ("train / garbage collection", COLLECT, "evaluate less often: collections wait for evaluations"),
        ("train / preflight and compile", COMPILE, "train.compile=off for runs this short"),
    ):
        if shares.get(key, 0.0) > limit:
            told.append(f"{key} takes {_p(shares[key])} of the whole (rule: {_p(limit)}): {way}.")
    return told


def largest_other(shares: Mapping[str, float]) -> str:
    """The largest part that is not training: of the pipeline's parts, with train taken apart."""
    training = {f"train / {part}" for part in TRAINING}
    candidates = [
        key for key in shares if key != "train" and key not in training and key.count(" / ") == key.startswith("train / ")
    ]
    return max(candidates, key=lambda key: shares[key])


def _p(share: float) -> str:
    return f"{100 * share:.0f} %"

"""The accumulation study's settings in its study file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gptcore.config.base import Section


class AccumulationOptions(Section):
    """What a cell measures, and how finely."""

    kind: Literal["exactness", "economy", "learning"] = Field(description="Which of the three questions.")
    micro_steps: tuple[int, ...] = Field(
        (1, 2, 4, 8, 16), min_length=2, description="Micro-steps of a step; must divide train.global_batch_size."
    )
    warm_steps: int = Field(20, ge=0, description="exactness: training steps before, so that no gradient is zero by design.")
    ranks: bool = Field(True, description="exactness: also over two processes.")
    repeats: int = Field(5, ge=1, description="economy: timed rounds; medians are reported.")
    lrs: tuple[float, ...] = Field((0.003,), min_length=1, description="learning: learning rates; the best of each arm counts.")

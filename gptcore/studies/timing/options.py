"""The timing study's settings in its study file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gptcore.config.base import Section


class TimingOptions(Section):
    """What a cell maps, and how often."""

    kind: Literal["pipeline", "step"] = Field(
        "step", description="pipeline: everything from ingestion to report, once; step: the inside of a training step."
    )
    repeats: int = Field(10, ge=2, description="step: timed steps of each kind, with and without the clock in turns.")
    tolerance: float = Field(
        0.03, gt=0, lt=1, description="A map whose sections miss the wall time by more than this share is refused."
    )

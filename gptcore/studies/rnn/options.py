"""The RNN study's settings in its study file."""

from __future__ import annotations

from pydantic import Field

from gptcore.config.base import Section
from gptcore.config.model import Family


class RnnOptions(Section):
    """Settings of the RNN study. The base experiment's model is the reference, a GPT."""

    family: Family = Field("gpt", description="The model of the arm.")
    n_layer: int | None = Field(None, ge=1, description="Layers of a recurrent family; empty: the reference's.")
    carried: bool = Field(False, description="Train with a state that goes on from batch to batch.")
    lrs: tuple[float, ...] = Field((), description="Learning rates tried on a short training; empty: the experiment's.")
    search_tokens: int = Field(262_144, ge=1, description="Training tokens of a try.")
    contexts: tuple[int, ...] = Field((64, 256, 1024, 4096), description="Lengths of text for the memory of decoding.")
    batches: tuple[int, ...] = Field((1, 32), min_length=1, description="Texts decoded at once.")
    decode_tokens: int = Field(64, ge=2, description="Tokens of a timed decoding.")
    repeats: int = Field(3, ge=2, description="Timed repeats.")

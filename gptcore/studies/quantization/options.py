"""The quantization study's settings in its study file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from gptcore.config.base import Section
from gptcore.quantize import METHODS, Method

FULL = "fp32"  # the trained weights as they are


class QuantizationOptions(Section):
    """Settings of the quantization study."""

    method: str = Field(FULL, description=f"{FULL}, or one of {', '.join(METHODS)}.")
    embedding: Literal["as the method", "bf16", "int8"] = Field("as the method", description="An untied embedding.")
    head: Literal["as the method", "bf16", "int8"] = Field("as the method", description="The matrix of the logits.")
    windows: int = Field(64, ge=1, description="Windows of the training split that GPTQ calibrates on.")
    qat_steps: int = Field(100, ge=1, description="Steps of fine-tuning of int4-qat.")
    batches: tuple[int, ...] = Field((1, 32), min_length=1, description="Texts decoded at once.")
    decode_tokens: int = Field(64, ge=2, description="Tokens of a timed decoding.")
    repeats: int = Field(5, ge=2, description="Timed repeats; medians and ranges are kept.")
    layers: bool = Field(False, description="Also quantize one matrix at a time.")
    ages: bool = Field(True, description="Also quantize every saved checkpoint of the run.")
    eval_tokens: int = Field(65_536, ge=2, description="Validation tokens for single layers and earlier checkpoints.")
    sample_tokens: int = Field(200, ge=1, description="Length of the sample text.")

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != FULL and value not in METHODS:
            raise ValueError(f"no such method; choose {FULL} or one of {', '.join(METHODS)}")
        return value

    def chosen(self) -> Method | None:
        """The method with its own head and embedding; None for the trained weights."""
        if self.method == FULL:
            return None
        changes = {key: getattr(self, key) for key in ("head", "embedding") if getattr(self, key) != "as the method"}
        return METHODS[self.method].with_parts(**changes)

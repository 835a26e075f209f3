"""The memorization study's settings in its study file."""

from __future__ import annotations

from pydantic import Field

from gptcore.config.base import Section


class MemorizationOptions(Section):
    """Settings of the memorization study."""

    passes: float = Field(20, gt=0, description="How often the training text is seen; stands in for the experiment's length.")
    ages: int = Field(10, ge=1, description="Checkpoints of the training that are measured, at equal distances.")
    prompts: int = Field(512, ge=1, description="Prompts taken from each split, at equal distances.")
    prompt_tokens: int = Field(32, ge=1, description="Length of a prompt.")
    recited_tokens: int = Field(24, ge=1, description="So many tokens must follow as they stand in the text.")
    eval_tokens: int = Field(65_536, ge=2, description="Tokens of each split for bits per byte, or as many as both have.")

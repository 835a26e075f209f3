"""The whole experiment: its sections, and those that are too small for a file of their own."""

from __future__ import annotations

from pydantic import Field, model_validator

from gptcore.config.base import Section
from gptcore.config.data import DataConfig, VocabConfig
from gptcore.config.model import ModelConfig
from gptcore.config.switches import StudiesConfig
from gptcore.config.train import TrainConfig


class EvaluateConfig(Section):
    """The fixed yardstick: the whole validation split, each token once, in order."""

    batch_size: int = Field(64, ge=1)
    """Sequences per forward pass; does not change the result on the whole split, but train.eval_tokens is rounded up to whole
    batches."""
    bootstrap: int = Field(1000, ge=0, description="Resamples for the 95 % interval of bits per byte; 0: no interval.")
    samples: int = Field(3, ge=0, le=100, description="Texts to sample from the trained model.")
    sample_tokens: int = Field(400, ge=1, description="Length of a sample, in tokens.")
    prompt: str = Field("", description="Start of every sample; empty: the start of a document.")
    temperature: float = Field(0.8, ge=0, le=10, description="Sampling temperature; 0 picks the likeliest token.")
    top_k: int | None = Field(None, ge=1, description="Sample among the k likeliest tokens only.")
    seed: int = Field(42, ge=0, description="Seed of the samples and of the interval.")


class ExperimentConfig(Section):
    """One experiment, from raw text to report."""

    name: str = Field("experiment", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    """Experiment name in MLflow; the YAML file's name by default."""
    data: DataConfig = Field(default_factory=DataConfig)
    vocab: VocabConfig = Field(default_factory=VocabConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    studies: StudiesConfig = Field(default_factory=StudiesConfig)

    @model_validator(mode="after")
    def _accumulation_divides(self) -> ExperimentConfig:
        if "accumulation" in self.studies.short and self.train.global_batch_size % self.studies.accumulation_steps:
            raise ValueError(
                f"studies.accumulation_steps={self.studies.accumulation_steps} does not divide "
                f"train.global_batch_size={self.train.global_batch_size}; change one, or set studies.accumulation=false"
            )
        return self

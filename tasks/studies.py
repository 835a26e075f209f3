"""The research items as tasks: a process and a nested MLflow run each, all measuring the run's trained model or its rival."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from gptcore.config import ExperimentConfig
from tasks.training import RETRIES, run_step


@task(task_run_name="profile a training step", persist_result=False)
def timing_profile(
    config: ExperimentConfig, checkpoint: Path, shards: Path, run: str, directory: Path
) -> dict[str, Any]:
    """Map where a training step's time goes: rows of section and milliseconds."""
    return run_step("gptcore.studies.timing", config, shards, run, directory, checkpoint=checkpoint)


@task(task_run_name="quantize {checkpoint.name} to int8", persist_result=False)
def quantize_model(
    config: ExperimentConfig, checkpoint: Path, shards: Path, run: str, directory: Path
) -> dict[str, Any]:
    """Compare int8 weights with the trained ones: size, decoding speed, bits per byte."""
    return run_step("gptcore.studies.quantization", config, shards, run, directory, checkpoint=checkpoint)


@task(task_run_name="accumulate over 1 and {config.studies.accumulation_steps} micro-steps", persist_result=False)
def gradient_accumulation(
    config: ExperimentConfig, checkpoint: Path, shards: Path, run: str, directory: Path
) -> dict[str, Any]:
    """Compare one batch in one and in several micro-steps: gradients, memory, speed."""
    return run_step("gptcore.studies.accumulation", config, shards, run, directory, checkpoint=checkpoint)


@task(task_run_name="train the LSTM baseline, {config.train.length}", persist_result=False, **RETRIES)
def rnn_baseline(config: ExperimentConfig, shards: Path, run: str, directory: Path) -> dict[str, Any]:
    """Train an LSTM with the GPT's parameters on the same tokens."""
    from gptcore.shards import ShardSet
    from gptcore.studies.rnn import baseline_config

    return run_step("gptcore.train", baseline_config(config, ShardSet.open(shards).vocab_size), shards, run, directory)

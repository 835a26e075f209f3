"""Evaluation as a task: the whole validation split in a fixed order, and samples of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from gptcore.config import ExperimentConfig
from gptcore.store import write_json
from gptloom.tasks.training import run_step


@task(task_run_name="evaluate {checkpoint.name}", persist_result=False)
def evaluate_model(config: ExperimentConfig, checkpoint: Path, shards: Path, run: str, directory: Path) -> dict[str, Any]:
    """Measure a checkpoint; returns val_loss (nats per token), val_ppl, val_bpb with its interval, samples (texts), …

    The samples come from a second process in `directory/samples`, nested once more.
    """
    result = run_step("gptcore.evaluate", config, shards, run, directory, checkpoint=checkpoint)
    result["samples"] = []
    if config.evaluate.samples:
        name = f"{run}/{directory.name}"
        sampled = run_step("gptcore.generate", config, shards, name, directory / "samples", checkpoint=checkpoint)
        result["samples"] = sampled["samples"]
    write_json(directory / "result.json", result)
    return result

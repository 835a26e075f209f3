"""Training as tasks: one `python -m gptcore.train` process each, for the model and for the bigram floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from gptcore.config import ExperimentConfig, dump_yaml
from gptcore.store import write_json
from tasks.process import run_device_process
from tasks.tracking import common_tags

CHECKPOINT_FIRST = ("gptcore.evaluate", "gptcore.generate")  # their first argument; the others take the config first


def run_step(
    module: str, config: ExperimentConfig, shards: Path, run: str, directory: Path, *, checkpoint: Path | None = None
) -> dict[str, Any]:
    """One step of pipeline run `run` as a process in `directory` (named like the step); returns and stores its result.

    The step's MLflow run is nested in `run` and named `<run>/<step>`. Raises what `run_device_process` raises.
    """
    step = directory.name
    directory.mkdir(parents=True, exist_ok=True)
    config_file = directory / "config.yaml"
    config_file.write_text(dump_yaml(config), encoding="utf-8")
    is_training = module == "gptcore.train"
    if module in CHECKPOINT_FIRST:
        positional = [str(checkpoint), "--config", str(config_file)]
    else:
        positional = [str(config_file), *(["--checkpoint", str(checkpoint)] if checkpoint else [])]
    result = run_device_process(
        [
            module,
            *positional,
            "--shards",
            str(shards),
            "--out",
            str(directory),
            "--run",
            f"{run}/{step}",
            "--parent",
            run,
        ],
        directory,
        experiment=config.name,
        tags=common_tags() | {"gptloom.step": step},
        max_steps=config.train.count_steps(config.model.block_size) if is_training else None,
    )
    write_json(directory / "result.json", result)
    return result


@task(task_run_name="train {config.model.family}, {config.train.length}", persist_result=False)
def train_model(config: ExperimentConfig, shards: Path, run: str, directory: Path) -> dict[str, Any]:
    """Train the experiment's model; returns checkpoint (absolute directory), val_loss, val_bpb, parameters, seconds, …"""
    return run_step("gptcore.train", config, shards, run, directory)


@task(task_run_name="train the bigram floor, {config.train.length}", persist_result=False)
def train_floor(config: ExperimentConfig, shards: Path, run: str, directory: Path) -> dict[str, Any]:
    """Train the bigram model with the same trainer and tokens: what every other model has to beat."""
    from gptcore.studies.rnn_sizes import floor_config

    return run_step("gptcore.train", floor_config(config), shards, run, directory)

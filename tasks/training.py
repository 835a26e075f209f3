"""Training as tasks: one `python -m gptcore.train` process each, for the model and for the bigram floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task
from prefect.client.schemas.objects import State

from gptcore.config import ExperimentConfig, UserError, write_yaml
from gptcore.store import content_id, read_json, verified, write_json
from gptloom.tasks.records.tracking import common_tags
from gptloom.tasks.runtime.log import run_logger
from gptloom.tasks.runtime.process import ProcessDied, run_device_process

DONE_FILE = "done.json"  # what a step was asked and what it answered
CHECKPOINT_FIRST = ("gptcore.evaluate", "gptcore.generate")  # their first argument; the others take the config first


def run_step(
    module: str, config: ExperimentConfig, shards: Path, run: str, directory: Path, *, checkpoint: Path | None = None
) -> dict[str, Any]:
    """One step of pipeline run `run` as a process in `directory` (named like the step); returns and stores its result.

    The step's MLflow run is nested in `run` and named `<run>/<step>`. A step that a resumed run has done before is not done
    again. Raises what `run_device_process` raises.
    """
    step = directory.name
    is_training = module == "gptcore.train"
    request = content_id([module, config.model_dump(mode="json"), str(shards), str(checkpoint)])
    if (done := done_before(directory, request)) is not None:
        return done
    directory.mkdir(parents=True, exist_ok=True)
    config_file = directory / "config.yaml"
    write_yaml(config, config_file)
    if module in CHECKPOINT_FIRST:
        positional = [str(checkpoint), "--config", str(config_file)]
    else:
        positional = [str(config_file), *(["--checkpoint", str(checkpoint)] if checkpoint else [])]
    result = run_device_process(
        [module, *positional, "--shards", str(shards), "--out", str(directory), "--run", f"{run}/{step}", "--parent", run],
        directory,
        experiment=config.name,
        tags=common_tags() | {"gptloom.step": step},
        max_steps=config.train.count_steps(config.model.block_size) if is_training else None,
    )
    write_json(directory / "result.json", result)
    write_json(directory / DONE_FILE, {"request": request, "result": result})
    return result


def done_before(directory: Path, request: str) -> dict[str, Any] | None:
    """The result of this very step in an earlier attempt of the run, whose checkpoint is still there and whole."""
    if not (directory / DONE_FILE).exists():
        return None
    try:
        done = read_json(directory / DONE_FILE)
        result: dict[str, Any] = done["result"]
        if done["request"] != request:
            return None
        if "checkpoint" in result:
            verified(Path(result["checkpoint"]))
    except (UserError, LookupError, TypeError) as error:
        run_logger().warning("%s is done again (%s)", directory.name, error)
        return None
    run_logger().info("%s was done before the run was interrupted: nothing to do", directory.name)
    return result


def is_worth_a_retry(_task: object, _run: object, state: State[Any]) -> bool:
    """A training that a signal ended goes on from its checkpoint; a mistake or a loss that is no number would only come again."""
    return isinstance(state.result(raise_on_failure=False), ProcessDied)


RETRIES: dict[str, Any] = {"retries": 2, "retry_delay_seconds": 5, "retry_condition_fn": is_worth_a_retry}


@task(task_run_name="train {config.model.family}, {config.train.length}", persist_result=False, **RETRIES)
def train_model(config: ExperimentConfig, shards: Path, run: str, directory: Path) -> dict[str, Any]:
    """Train the experiment's model; returns checkpoint (absolute directory), val_loss, val_bpb, parameters, seconds, …"""
    return run_step("gptcore.train", config, shards, run, directory)


@task(task_run_name="train the bigram floor, {config.train.length}", persist_result=False, **RETRIES)
def train_floor(config: ExperimentConfig, shards: Path, run: str, directory: Path) -> dict[str, Any]:
    """Train the bigram model with the same trainer and tokens: what every other model has to beat."""
    from gptcore.studies.sizes import floor_config

    return run_step("gptcore.train", floor_config(config), shards, run, directory)

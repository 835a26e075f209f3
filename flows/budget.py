"""A budget in minutes instead of a model size: the worker calibrates itself, says what it will do, and does it.

python -c "from gptloom.flows.budget import budget; print(budget(minutes=3))"        # or the form `budget` in the Prefect UI
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.context import FlowRunContext
from prefect.exceptions import CancelledRun

from gptcore.config import ExperimentConfig, UserError, load_config, write_yaml
from gptcore.config.switches import SWITCHES
from gptcore.config.train import DeviceName
from gptcore.markdown import markdown_table
from gptcore.store import home_dir
from gptloom.flows.forms import Experiment, Overrides, titled, titled_text
from gptloom.flows.pipeline import pipeline
from gptloom.flows.run import STOPS, cancelled, prepare_data
from gptloom.tasks.records.tracking import check_store, common_tags
from gptloom.tasks.runtime.log import run_logger
from gptloom.tasks.runtime.process import run_device_process

Minutes = Annotated[float, titled("Budget (minutes)", ge=1, le=100_000)]
Corpus = Annotated[str, titled_text("Corpus")]
DeviceChoice = Annotated[DeviceName, titled("Device")]


@flow(name="budget", flow_run_name="budget of {minutes} minutes", persist_result=False, result_serializer="json")
def budget(
    minutes: Minutes = 5,
    corpus: Corpus = "",
    device: DeviceChoice = "auto",
    experiment: Experiment = "experiments/shakespeare.yaml",
) -> dict[str, Any]:
    """Train the best model that so many minutes allow: size, batch and steps come from a short calibration on this worker.

    Args:
        minutes: From the start of this run to its report; it ends within 15 % of them.
        corpus: Text, as in data.source: a file, a folder, an address. Empty: the experiment's own.
        device: Where to train; auto takes a GPU if the worker has one.
        experiment: Everything that is not size, batch or length.
    """
    start = time.monotonic()
    overrides = [f"train.device={device}", *([f"data.source={corpus}"] if corpus else [])]
    config, home = load_config(experiment, overrides), home_dir()
    check_store()
    try:
        shards = prepare_data(config, home, block_size=32).shards
        began = time.monotonic()
        plan = calibrate(config, shards, minutes, home / "budgets" / f"{time.time_ns()}")
        overhead = time.monotonic() - began - plan["seconds"]  # what a process costs before and after its work
        left = 60 * minutes - (time.monotonic() - start) - rest_seconds(plan, overhead)
        if left < 0.3 * 60 * minutes:
            raise UserError(
                f"minutes={minutes:g}: data, calibration and evaluation leave {max(left, 0):.0f} s to train in; give more minutes or less text"
            )
        show_estimate(plan, minutes, left)
        sizes = [f"{s}.{k}={v}" for s, fields in plan["changes"].items() for k, v in fields.items()]
        studies = [f"studies.{name}=false" for name in SWITCHES]
        result = pipeline(
            experiment=experiment,
            overrides=Overrides(more=[*overrides, *sizes, *studies, f"train.minutes={left / 60:.4f}", "evaluate.samples=1"]),
        )
    except (*STOPS, CancelledRun) as stop:  # the last one: what the pipeline raises here that was stopped itself
        return cancelled(stop)
    taken = (time.monotonic() - start) / 60
    run_logger().info("%.2f of %g minutes taken (%+.0f %%)", taken, minutes, 100 * (taken / minutes - 1))
    return {**result, "minutes": minutes, "minutes_taken": round(taken, 3), "parameters": plan["parameters"]}


@task(task_run_name="calibrate for {minutes} minutes", persist_result=False)
def calibrate(config: ExperimentConfig, shards: Path, minutes: float, directory: Path) -> dict[str, Any]:
    """Time a few steps of growing models on the device; the choice, as `gptcore.train.budget` returns it."""
    directory.mkdir(parents=True)
    write_yaml(config, directory / "config.yaml")
    return run_device_process(
        [
            "gptcore.train.budget",
            str(directory / "config.yaml"),
            "--shards",
            str(shards),
            "--out",
            str(directory),
            "--minutes",
            f"{0.8 * minutes:.3f}",
        ],
        directory,
        experiment=config.name,
        tags=common_tags(),
    )


def rest_seconds(plan: dict[str, Any], overhead: float) -> float:
    """What follows the training: its last evaluation, the evaluation step, samples, registry, report; three processes in all."""
    return 2 * plan["eval_seconds"] + 3 * overhead + 6.0


def show_estimate(plan: dict[str, Any], minutes: float, seconds: float) -> None:
    """Before anything starts: what will be trained, and until when."""
    model, steps = plan["changes"]["model"], int(plan["tok_per_sec"] * seconds / plan["tokens_per_step"])
    text = (
        f"{minutes:g} minutes: a GPT of {plan['parameters']:,} parameters ({model['n_layer']} layers, width {model['n_embd']}, context "
        f"{model['block_size']}), about {steps:,} steps of {plan['tokens_per_step']:,} tokens at {plan['tok_per_sec']:,.0f} tok/s; "
        f"{seconds / 60:.1f} minutes of it train, the rest evaluates and reports"
    )
    run_logger().info("%s", text)
    if FlowRunContext.get() is None:
        return
    rows = [[f"{t['parameters']:,}", f"{t['tok_per_sec']:,.0f}", f"{t['tokens'] / t['parameters']:.1f}"] for t in plan["tried"]]
    table = markdown_table(rows, ["parameters tried", "tok/s", "tokens per parameter in the time"])
    create_markdown_artifact(
        key="estimate", markdown=f"{text}.\n\n{table}\n", description="What these minutes buy, before they begin"
    )

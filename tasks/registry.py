"""Registration as a task: what a pipeline run trained becomes a version of its model, if it is good."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import task

from gptcore.config import ExperimentConfig
from gptcore.errors import first_line
from gptcore.store import read_manifest
from gptloom.tasks.records import registry
from gptloom.tasks.records.tracking import is_store_trouble
from gptloom.tasks.runtime.log import run_logger


@task(task_run_name="register the model", persist_result=False)
def register_model(
    config: ExperimentConfig,
    result: Mapping[str, Any],
    floor_bpb: float | None,
    data: Mapping[str, Path],
    run: str,
    mlflow_run_id: str | None,
) -> dict[str, Any]:
    """Register what a pipeline run trained, if it is good: {"model": NAME/VERSION or None, "reason"}.

    Good is better than the bigram floor, where that was trained, else than a uniform guess. result: of the evaluation. data:
    the run's corpus, vocab and shards. The registry is a service of MLflow's: while it is away, the run goes on without.
    """
    bpb, loss = result["val_bpb"], result["val_loss"]
    vocab_size = read_manifest(data["shards"])["vocab_size"]
    if floor_bpb is not None and bpb >= floor_bpb:
        reason = f"{bpb:.4f} bits per byte are no better than the bigram floor's {floor_bpb:.4f}"
    elif loss >= math.log(vocab_size):
        reason = f"{loss:.4f} nats are no better than a uniform guess"
    elif mlflow_run_id is None:
        reason = "MLflow could not be reached"
    else:
        facts = {key: path.name for key, path in data.items()}
        facts |= {"run": run, "val_bpb": bpb, "val_loss": loss, "parameters": result["parameters"]}
        card = registry.model_card(
            f"{config.name}: {run}", facts, f"A {config.model.family} trained on {config.data.source_name}."
        )
        try:
            version = registry.register(config.name, Path(result["checkpoint"]), mlflow_run_id, facts, card)
        except Exception as error:
            if not is_store_trouble(error):
                raise
            reason = f"MLflow does not take it ({first_line(error)})"
        else:
            run_logger().info("registered %s, val_bpb %s", version.label, bpb)
            return {"model": version.label, "reason": "good: the new challenger"}
    run_logger().warning("not registered: %s", reason)
    return {"model": None, "reason": reason}

"""The research items as tasks: inside a pipeline run in their short forms, measuring the run's model or its rival, and as studies
of their own, whose cells share one process a device.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.context import TaskRunContext

from gptcore.config import ExperimentConfig
from gptcore.config.study import load_study
from gptloom.tasks.records.tracking import common_tags
from gptloom.tasks.reporting import links
from gptloom.tasks.runtime.log import run_logger
from gptloom.tasks.runtime.process import run_device_process
from gptloom.tasks.training import RETRIES, run_step

PROGRESS_S = 3.0


@task(task_run_name="profile a training step", persist_result=False)
def timing_profile(config: ExperimentConfig, checkpoint: Path, shards: Path, run: str, directory: Path) -> dict[str, Any]:
    """Map where a training step's time goes: rows of section and milliseconds."""
    return run_step("gptcore.studies.timing.short", config, shards, run, directory, checkpoint=checkpoint)


@task(task_run_name="quantize {checkpoint.name} to int8", persist_result=False)
def quantize_model(config: ExperimentConfig, checkpoint: Path, shards: Path, run: str, directory: Path) -> dict[str, Any]:
    """Compare int8 weights with the trained ones: size, decoding speed, bits per byte."""
    return run_step("gptcore.studies.quantization.short", config, shards, run, directory, checkpoint=checkpoint)


@task(task_run_name="accumulate over 1 and {config.studies.accumulation_steps} micro-steps", persist_result=False)
def gradient_accumulation(
    config: ExperimentConfig, checkpoint: Path, shards: Path, run: str, directory: Path
) -> dict[str, Any]:
    """Compare one batch in one and in several micro-steps: gradients, memory, speed."""
    return run_step("gptcore.studies.accumulation.short", config, shards, run, directory, checkpoint=checkpoint)


@task(task_run_name="train the LSTM baseline, {config.train.length}", persist_result=False, **RETRIES)
def rnn_baseline(config: ExperimentConfig, shards: Path, run: str, directory: Path) -> dict[str, Any]:
    """Train an LSTM with the GPT's parameters on the same tokens."""
    from gptcore.shards import ShardSet
    from gptcore.studies.sizes import baseline_config

    return run_step("gptcore.train", baseline_config(config, ShardSet.open(shards).vocab_size), shards, run, directory)


# --- studies of their own: `gptloom study NAME` ----------------------------------------------------------------------------


@task(task_run_name="measure cells, part {part} of {parts}", persist_result=False)
def run_part(study: Path, shards: Path, run: str, directory: Path, part: int, parts: int) -> dict[str, Any]:
    """The cells of one device as a list inside one process, a nested MLflow run each; returns how many, and how many failed."""
    plan = load_study(study)
    folder = directory / "cells" / str(part)
    share = len(plan.cells[part::parts])
    args = ["gptcore.studies", str(study), "--shards", str(shards), "--out", str(folder)]
    args += ["--part", f"{part}/{parts}", "--run", run, "--parent", run]
    with _cell_progress(folder, share):
        return run_device_process(args, folder, experiment=f"study-{plan.name}", tags=common_tags() | {"gptloom.step": "cell"})


@task(task_run_name="write the report", persist_result=False)
def report_study(directory: Path, command: str, seconds: float, mlflow_run_id: str | None = None) -> dict[str, Any]:
    """Tables, report and conclusion of the study in `directory`; also as artifacts of the Prefect flow run."""
    from gptcore.studies.finish import finish

    result = finish(directory, command=command, seconds=round(seconds, 1))
    run_logger().info("%s", result["conclusion"])
    if TaskRunContext.get() is not None:
        report = Path(result["report"])
        findings = "".join(f"- {finding}\n" for finding in result["findings"])
        create_markdown_artifact(
            f"{result['conclusion']}\n\n{findings}\n{links(report, mlflow_run_id)}\n",
            key="report",
            description=result["conclusion"],
        )
        rows = read_table(directory / "tables" / "results.parquet")
        if rows:
            create_table_artifact(rows, key="results", description=f"{result['study']}: the first {len(rows)} rows")
    return result


def read_table(path: Path, limit: int = 200) -> list[dict[str, Any]]:
    """The first rows of a table that a study wrote, JSON-able; none where there is none."""
    import pandas as pd

    if not path.is_file():
        return []
    frame = pd.read_parquet(path).head(limit)
    return [{str(k): (None if pd.isna(v) else v) for k, v in row.items()} for row in frame.to_dict("records")]


@contextmanager
def _cell_progress(folder: Path, total: int) -> Iterator[None]:
    """Prefect's progress bar over the cells of a part, from a thread: how many have left their cell.json."""
    if TaskRunContext.get() is None:
        yield
        return
    stop = threading.Event()

    def work() -> None:
        artifact: Any = None
        while True:
            is_last = stop.wait(PROGRESS_S)
            percent = 100.0 * len(list(folder.glob("*/cell.json"))) / max(1, total)
            try:
                if artifact is None:
                    artifact = create_progress_artifact(percent, key=f"cells-{folder.name}", description=f"of {total} cells")
                else:
                    update_progress_artifact(artifact, percent)
            except Exception as error:  # a picture of the work must not stop the work
                run_logger().warning("no progress bar: Prefect's server says %s", error)
                return
            if is_last:
                return

    context = contextvars.copy_context()  # the artifact belongs to this task run
    thread = threading.Thread(target=context.run, args=(work,), name="gptloom-cells", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)

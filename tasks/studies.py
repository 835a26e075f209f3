"""Studies as tasks: their short forms inside a pipeline run, on the run's model, and whole ones, whose cells share one process a device."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.context import TaskRunContext

from gptcore.config import ExperimentConfig
from gptcore.config.study import load_study
from gptcore.store import content_id, read_json, write_json
from gptloom.tasks.records.forwarding import Forwarder, write_tags
from gptloom.tasks.records.tracking import common_tags
from gptloom.tasks.reporting import links
from gptloom.tasks.runtime.log import run_logger
from gptloom.tasks.runtime.process import close_journals, run_device_process
from gptloom.tasks.training import DONE_FILE, RETRIES, done_before, run_step


@task(task_run_name="measure studies on {checkpoint.name}", persist_result=False)
def measure_short(
    config: ExperimentConfig, checkpoint: Path, shards: Path, run: str, directory: Path
) -> dict[str, dict[str, Any]]:
    """The short forms of the studies that are on, in one process, each in a folder of its own in `directory`; what was measured.

    What a resumed run has measured before is not measured again. One that fails gives {"error": reason, "code": exit code}, the others their numbers.
    """
    asked = ["gptcore.studies.short", config.model_dump(mode="json"), str(shards), str(checkpoint)]
    requests = {name: content_id([name, *asked]) for name in config.studies.short}
    requests = {name: request for name, request in requests.items() if done_before(directory / name, request) is None}
    if not requests:
        return {}
    args = ["gptcore.studies.short", str(directory / "config.yaml"), *requests, "--shards", str(shards)]
    args += ["--checkpoint", str(checkpoint), "--out", str(directory), "--run", run]
    (directory / "studies").mkdir(exist_ok=True)  # the process's log
    with ExitStack() as following:
        for name in requests:
            write_tags(directory / name, common_tags() | {"gptloom.step": name})
            write_tags(directory / name / "cells", common_tags() | {"gptloom.step": "cell"})
            (directory / name / "result.json").unlink(missing_ok=True)  # of another request
            following.enter_context(Forwarder(directory / name, config.name).follow())
        try:
            failed = run_device_process(args, directory / "studies", experiment=config.name)["failed"]
        except BaseException as error:
            for name in requests:
                if not (directory / name / "result.json").exists():
                    close_journals(directory / name, error)
            raise
    found: dict[str, dict[str, Any]] = {}
    for name, request in requests.items():
        if name in failed:
            run_logger().error("the study %s failed: %s", name, failed[name]["error"])
            found[name] = failed[name]
        else:
            found[name] = read_json(directory / name / "result.json")
            write_json(directory / name / DONE_FILE, {"request": request, "result": found[name]})
    return found


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
    tags = common_tags() | {"gptloom.step": "cell"}
    return run_device_process(args, folder, experiment=f"study-{plan.name}", tags=tags, cells=share)


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
    frame = pd.read_parquet(path, page_checksum_verification=True).head(limit)
    return [{str(k): (None if pd.isna(v) else v) for k, v in row.items()} for row in frame.to_dict("records")]

"""A study as one Prefect flow: text → shards → the cells, a process a device → report.

gptloom study timing --smoke            # or from the Prefect UI, where the parameters below are a form
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.runtime import flow_run
from pydantic import BaseModel, ConfigDict, Field

from gptcore.config import ExperimentConfig, with_changes
from gptcore.config.study import StudyPlan, find_study, load_study, write_plan
from gptcore.store import home_dir
from gptloom.flows.forms import NO_SECRET, StudyName, titled
from gptloom.flows.run import STOPS, cancelled, new_run_name, open_run, prepare_data
from gptloom.tasks.records.tracking import NOTE_TAG, check_store
from gptloom.tasks.studies import report_study, run_part


class StudyForm(BaseModel):
    """What differs from the study file; empty fields keep the file's values."""

    model_config = ConfigDict(extra="forbid")

    seeds: list[int] = Field(default_factory=list, title="Seeds", description="study.seeds: one cell of each arm a seed.")
    minutes: float = Field(
        0, ge=0, title="Minutes at most", description="study.minutes: no cell is begun later; 0 keeps the file's."
    )
    more: list[str] = Field(
        default_factory=list,
        title="Other fields",
        description="Any other field as section.field=value: of the base experiment (train.max_steps=100), of the study's "
        "options (options.repeats=5), of the study file (study.baseline=fp32).",
        json_schema_extra={"items": {"type": "string"} | NO_SECRET},
    )

    def as_list(self) -> list[str]:
        """The form as `section.field=value`."""
        values = [f"study.seeds={list(self.seeds)}"] if self.seeds else []
        return values + ([f"study.minutes={self.minutes}"] if self.minutes else []) + self.more


NO_CHANGES = StudyForm()
Changes = Annotated[StudyForm, titled("Changes to the study")]
Smoke = Annotated[bool, titled("Smallest form")]


def _flow_run_name() -> str:
    return new_run_name(Path(str(flow_run.get_parameters()["name"])).stem)


@flow(name="study", flow_run_name=_flow_run_name, persist_result=False, result_serializer="json")
def study(name: StudyName = "timing", smoke: Smoke = False, changes: Changes = NO_CHANGES) -> dict[str, Any]:
    """Measure every cell of a study and write its report; cells that are kept from before are not measured again.

    Args:
        name: One of experiments/studies/, or the path of a study file (YAML).
        smoke: Only to see that everything works; no figure to believe.
        changes: What differs from the study file.
    """
    start = time.monotonic()
    plan = checked_plan(name, changes.as_list(), smoke)
    check_store()
    home = home_dir()
    experiment = study_experiment(plan)
    directory = home / "runs" / (flow_run.get_name() or new_run_name(plan.name))
    try:
        with open_run(experiment, directory, step="study") as run:
            shards = prepare_data(plan.base, home, run, block_size=plan.block_size).shards
            file = write_plan(plan, directory)
            from gptcore.studies.engine import count_parts

            parts = count_parts(plan)
            measure(file, shards, run.name, directory, parts)
            command = " ".join(["gptloom study", name, *(["--smoke"] if smoke else []), *changes.as_list()])
            result = run.step("report", report_study, directory, command, time.monotonic() - start, run.mlflow_run_id)
            run.journal.tags({NOTE_TAG: result["conclusion"]})
            if result["metrics"]:
                run.journal.metrics(result["metrics"], tokens_seen=0)
            counts = {f"study/{key}": float(result[key]) for key in ("cells", "failed", "not_run")}
            run.journal.metrics(counts, tokens_seen=0)
            run.keep("study.yaml", "config.yaml", "report.html", "tables", "log_entry.md")
    except STOPS as stop:
        return cancelled(stop)
    return {**result, "flow_run_id": flow_run.get_id(), "mlflow_run_id": run.mlflow_run_id}


def checked_plan(name: str, overrides: list[str], smoke: bool) -> StudyPlan:
    """The study with every cell and option looked at, before anything starts. Raises UserError. Loads torch, hence not at import."""
    from gptcore.studies.engine import check_options

    plan = load_study(find_study(name), overrides, smoke=smoke)
    check_options(plan)
    return plan


def measure(file: Path, shards: Path, run: str, directory: Path, parts: int) -> None:
    """All cells: in this thread where there is one device, so that Ctrl-C reaches the process; else a task a device, side by side."""
    if parts == 1:
        run_part(file, shards, run, directory, 0, 1)
        return
    futures = [run_part.submit(file, shards, run, directory, part, parts) for part in range(parts)]
    try:
        for future in futures:
            future.result()
    except BaseException:
        (directory / "cells" / "stop").touch()  # the others leave at their next step
        raise


def study_experiment(plan: StudyPlan) -> ExperimentConfig:
    """The base experiment under the study's name: all runs of a study stand in one MLflow experiment, and compare there."""
    return with_changes(plan.base).model_copy(update={"name": f"study-{plan.name}"})

"""The report as a task: one HTML file, linked from the Prefect flow run, and there the comparison as a table and the curves.

A browser follows no link from a server's page to a file, so links go to MLflow, which has the report too, where its server runs.
"""

from __future__ import annotations

import base64
from pathlib import Path

from prefect import task
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.context import TaskRunContext

from gptcore.markdown import markdown_table
from gptcore.store import home_dir
from gptloom.tasks.records.tracking import run_page
from gptloom.tasks.runtime.log import run_logger


@task(task_run_name="write the report", persist_result=False)
def build_report(directory: Path, mlflow_run_id: str | None = None) -> Path:
    """Write report.html of the run in `directory` (absolute); returns its path."""
    from gptcore.report import comparison_table, format_comparison, headline, write_report
    from gptcore.report.picture import draw_curves

    report = write_report(directory)
    run_logger().info("report %s", report)
    if TaskRunContext.get() is not None:
        table = markdown_table(format_comparison(comparison_table(directory)).values.tolist(), COLUMNS)
        said = headline(directory)
        create_markdown_artifact(f"{said}\n\n{table}\n\n{links(report, mlflow_run_id)}\n", key="report", description=said)
        if picture := draw_curves(directory, directory / "curves.png"):
            create_image_artifact(data_url(picture), key="curves", description="bits per byte over tokens seen")
    return report


COLUMNS = ["model", "parameters", "val loss", "bits per byte", "perplexity", "tok/s", "seconds"]


def links(report: Path, mlflow_run_id: str | None) -> str:
    """Where to read on: the run and its report in MLflow, where that is a server; the file itself always."""
    page = run_page(mlflow_run_id)
    there = f"[The run in MLflow]({page}) · [report]({page}/artifacts/{report.name}) · " if page else ""
    home = home_dir()
    return f"{there}file `{f'$GPTLOOM_HOME/{report.relative_to(home)}' if report.is_relative_to(home) else report}`"


def data_url(png: Path) -> str:
    """A picture inside its own address, so that Prefect's page shows it without a file server."""
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()

"""The report as a task: one HTML file, linked from the Prefect flow run, and the comparison as a table there."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.context import TaskRunContext

from tasks.process import run_logger


@task(task_run_name="write the report", persist_result=False)
def build_report(directory: Path) -> Path:
    """Write report.html of the run in `directory` (absolute); returns its path."""
    from gptcore.report import comparison_table, format_comparison, headline, write_report

    report = write_report(directory)
    run_logger().info("report %s", report)
    if TaskRunContext.get() is not None:
        table = markdown_table(format_comparison(comparison_table(directory)).values.tolist(), COLUMNS)
        create_link_artifact(report.as_uri(), link_text="report.html", key="report", description=headline(directory))
        create_markdown_artifact(
            f"{headline(directory)}\n\n{table}\n", key="comparison", description="the run's models"
        )
    return report


COLUMNS = ["model", "parameters", "val loss", "bits per byte", "perplexity", "tok/s", "seconds"]


def markdown_table(rows: list[list[str]], columns: list[str]) -> str:
    """Rows of text as a Markdown table, numbers to the right."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in [columns, rule, *rows]
    )

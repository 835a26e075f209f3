"""A run's numbers as one self-contained HTML file that opens anywhere, offline.

    python -m gptcore.report .gptloom/runs/RUN      # writes and prints .gptloom/runs/RUN/report.html

record.py reads a run directory, figures.py turns numbers into plots, page.py turns text, tables and plots into HTML, studies.py
shows any study's result, wording.py writes numbers, theme.py is how it looks, run.py puts a run's report together.
No torch, no network: everything the page needs is inside it.
"""

from gptcore.report.page import write_page
from gptcore.report.record import RunRecord, StepRecord, comparison_table, format_comparison, read_run
from gptcore.report.run import headline, write_report

__all__ = [
    "RunRecord",
    "StepRecord",
    "comparison_table",
    "format_comparison",
    "headline",
    "read_run",
    "write_page",
    "write_report",
]

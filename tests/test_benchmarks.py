"""The benchmarks' last line, without running them.

.venv/bin/pytest tests/test_benchmarks.py
"""

import runpy
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_main_job_says_which_goals_were_met():
    """A benchmark whose goal can never be missed, or whose figures lack a field that programs read."""
    build_figures = runpy.run_path(str(BENCHMARKS / "main_job.py"))["build_figures"]
    figures = build_figures(601.0, {"val_loss": 1.75, "val_bpb": 2.4})
    assert [figure["met"] for figure in figures] == [False, True, None]
    for figure in figures:
        assert set(figure) == {"name", "unit", "ours", "peer", "ratio", "goal", "met", "n", "spread"}

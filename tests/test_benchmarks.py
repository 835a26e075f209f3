"""The benchmarks' last line, without running them.

.venv/bin/pytest tests/test_benchmarks.py
"""

import runpy
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_main_job_says_which_goals_were_met():
    """A benchmark whose goal can never be missed, or whose figures lack a field that programs read."""
    build_figures = runpy.run_path(str(BENCHMARKS / "main_job.py"))["build_figures"]
    results = [{"val_loss": loss, "val_bpb": 2.4} for loss in (1.75, 1.5, 1.6)]
    figures = build_figures([10.0, 601.0, 20.0], results)
    assert [figure["met"] for figure in figures] == [False, True, None]
    assert [figure["ours"] for figure in figures] == [20.0, 1.6, 2.4]
    for figure in figures:
        assert set(figure) == {"name", "unit", "ours", "peer", "ratio", "goal", "met", "n", "spread"}

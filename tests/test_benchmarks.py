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


def test_a_goal_about_a_ratio_and_one_about_every_run():
    figure = runpy.run_path(str(BENCHMARKS / "figures.py"))["figure"]
    sooner = figure("time", "s", [10.0, 30.0], peer=[100.0], goal=1 / 6, of="ratio")
    assert (sooner["ratio"], sooner["met"], sooner["spread"]) == (0.2, False, [10.0, 30.0])
    assert figure("loss", "nats", [1.4, 1.5], goal=1.45)["met"] is False  # the median would hide the second run
    assert figure("speed", "tok/s", [150.0], peer=[100.0], goal=1.5, goal_is="at least", of="ratio")["met"] is True


def test_training_seconds_leave_evaluations_out(tmp_path, monkeypatch):
    from gptcore.journal import Journal

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    evaluations = runpy.run_path(str(BENCHMARKS / "ours.py"))["evaluations"]
    journal = Journal(tmp_path)
    journal.metrics({"val/loss": 4.0}, tokens_seen=0)
    for step, loss in ((1, 3.0), (2, 2.0)):
        journal.metrics({"perf/tok_per_sec": 50.0}, tokens_seen=100 * step, step=step)
        journal.metrics({"val/loss": loss}, tokens_seen=100 * step, step=step)
    assert evaluations(tmp_path) == [(0, 4.0, 0.0), (1, 3.0, 2.0), (2, 2.0, 4.0)]

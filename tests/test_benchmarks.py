"""The benchmarks' last line, without running them.

.venv/bin/pytest tests/test_benchmarks.py
"""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.mark.integration
def test_recovery_from_a_kill(monkeypatch, capsys):
    """A benchmark that breaks when a trainer's journal or command line changes is noticed on the GPU, weeks later."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    settings = ["train.max_steps=90", "train.eval_interval=90", "train.compile=off"]
    sizes = ["--experiment", "tiny.yaml", "--kills", "1", "--pairs", "2", "--steps", "5"]
    monkeypatch.setattr(sys, "argv", ["recovery.py", *settings, *sizes])
    assert runpy.run_path(str(BENCHMARKS / "recovery.py"))["main"]() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(figure["ours"] > 0, figure["met"]) for figure in found["figures"]] == [(True, True), *[(True, None)] * 3]
    assert found["kills"][0]["step"] > 0
    assert not torch.are_deterministic_algorithms_enabled()


FIELDS = {"name", "unit", "ours", "peer", "ratio", "goal", "met", "n", "spread"}


def test_data_goals_are_values_ratios_or_limits():
    """A figure that counts as met on the wrong side of its goal."""
    figure = runpy.run_path(str(BENCHMARKS / "data.py"))["figure"]
    assert figure("speed", "MB/s", [59.0, 61.0, 70.0], goal=60.0)["met"]
    assert not figure("speed", "MB/s", [99.0], goal=10.0, peer=10.0)["met"]
    assert figure("memory", "MiB", [900.0], goal=953.0, at_most=True)["met"]
    assert not figure("memory", "MiB", [960.0], goal=953.0, at_most=True)["met"]
    assert figure("no goal", "MB/s", [1.0])["met"] is None
    assert set(figure("any", "s", [1.0])) == FIELDS


def test_data_takes_every_text_once_and_says_what_it_varied(tmp_path):
    """A benchmark on one text repeated, or on varied text sold as real."""
    module = runpy.run_path(str(BENCHMARKS / "data.py"))
    (tmp_path / "in").mkdir()
    for name, content in {"a.py": b"one", "b.py": b"one", "c.txt": b"two", "d.txt": b"\0", "e.bin": b"no"}.items():
        (tmp_path / "in" / name).write_bytes(content)
    module["gather"].__globals__["ROOTS"] = (str(tmp_path / "in"),)
    assert module["gather"](tmp_path / "six", 6) == {"bytes": 6, "files": 2, "varied_bytes": 0}
    assert module["gather"](tmp_path / "more", 9)["varied_bytes"] == 3
    texts = {path.read_bytes() for path in (tmp_path / "more").rglob("*.txt")}
    assert len(texts) == 3


def test_batches_compare_medians_of_rounds():
    build_figure = runpy.run_path(str(BENCHMARKS / "batches.py"))["build_figure"]
    made = build_figure(64, 256, [100.0, 110.0, 300.0], [10.0, 12.0, 10.0])
    assert (made["ratio"], made["met"], made["spread"]) == (10.0, True, [9.17, 30.0])
    assert set(made) == FIELDS

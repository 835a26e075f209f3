"""The benchmarks' last line, without running them.

.venv/bin/pytest tests/test_benchmarks.py
"""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
DOCS = BENCHMARKS.parent / "docs"


@pytest.fixture(autouse=True)
def modules_beside_the_scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


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
    assert figure("speed", "MB/s", [59.0, 61.0, 70.0], goal=60.0, goal_is="at least", of="median")["met"]
    assert not figure("speed", "MB/s", [99.0], goal=10.0, peer=[10.0], goal_is="at least", of="ratio")["met"]
    assert figure("memory", "MiB", [900.0], goal=953.0, of="median")["met"]
    assert not figure("memory", "MiB", [960.0], goal=953.0, of="median")["met"]
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
    figure = runpy.run_path(str(BENCHMARKS / "batches.py"))["figure"]
    goals = {"goal": 10.0, "goal_is": "at least", "of": "ratio", "in_turns": True}
    made = figure("batches", "tokens per second", [100.0, 110.0, 300.0], peer=[10.0, 12.0, 10.0], **goals)
    assert (made["ratio"], made["met"], made["spread"]) == (10.0, True, [9.17, 30.0])
    assert set(made) == FIELDS


def scaling_records():
    """Two GPUs that are 90 % as fast, each, as one; losses a little apart."""
    facts = {"flops_per_token": 1e9, "parameters": 10, "peak_flops": 1e15, "peak_mib": 5, "device": "toy"}

    def speed(kind, processes, step_ms, tokens, parallel="ddp"):
        one = {"kind": kind, "processes": processes, "parallel": parallel, "step_ms": step_ms, "tokens_per_step": tokens}
        return one | facts

    return [
        {"kind": "losses", "processes": 1, "parallel": "ddp", "losses": [5.0, 4.0]},
        {"kind": "losses in parts", "processes": 1, "losses": [5.0, 4.375]},
        {"kind": "losses in fp32", "processes": 1, "losses": [5.0, 4.25]},
        speed("strong", 1, [190.0], 2000),
        speed("weak", 1, [100.0, 100.0], 1000),
        {"kind": "links", "processes": 2, "bus_gb_per_second": 300.0, "tiny_us": 20.0},
        {"kind": "losses", "processes": 2, "parallel": "fsdp", "losses": [5.0, 4.5]},
        speed("weak", 2, [125.0, 1000 / 9], 2000, "fsdp"),
        {"kind": "weak without exchange", "processes": 2, "step_ms": [100.0]},
        speed("weak", 2, [1000 / 9, 1000 / 9], 2000),
    ]


def test_scaling_judges_efficiency_exchange_and_losses(monkeypatch):
    """Two GPUs held against one as if they had done the same work, or a loss that is off and counts as met."""
    figures = {f["name"]: f for f in runpy.run_path(str(BENCHMARKS / "scaling.py"))["build_figures"](scaling_records())}
    assert figures["weak: 2 GPUs, ddp"]["ratio"] == pytest.approx(1.8)
    assert figures["weak: 2 GPUs, ddp"]["mfu_percent"] == pytest.approx(0.9)
    efficiency = figures["weak efficiency: 2 GPUs, ddp"]
    assert (efficiency["ours"], efficiency["goal"], efficiency["met"]) == (90.0, 95.0, False)
    assert figures["weak communication share: 2 GPUs, ddp"]["ours"] == 10.0
    assert figures["weak communication share: 2 GPUs, fsdp"]["spread"] == [10.0, 20.0]
    distance = figures["largest distance to one GPU's losses: 2 GPUs, fsdp"]
    assert (distance["ours"], distance["met"]) == (0.125, False)
    assert figures["largest distance of losses on one GPU: compiled whole and in parts"]["ours"] == 0.375


def test_the_scaling_model_on_cases_one_can_do_by_hand():
    module = runpy.run_path(str(DOCS / "scaling_model.py"))
    machine = module["Machine"](link=100e9, network=10e9, link_latency=0.0, network_latency=0.0, mfu=1.0, peak_flops=1e14)
    assert 2 * machine.all_gather(1e9, 2) == pytest.approx(0.01)
    assert 2 * machine.all_gather(1e9, 4) == pytest.approx(0.015)
    assert 2 * machine.all_gather(1e9, 16) == pytest.approx(2 * 15 / 16 * 1e9 / 80e9)  # eight adapters of 10 GB/s
    assert machine.all_to_all(1e9, 16) == pytest.approx(8 / 16 * 1e9 / 10e9)
    assert machine.all_gather(1e9, 1) == 0.0
    job = module["Job"](layers=2, width=10, vocab=100, context=20)
    assert (job.matrices, job.parameters) == (2 * 12 * 100, 2 * 12 * 100 + 2 * 1000)
    assert job.flops_per_token == 6 * 3400 + 12 * 2 * 10 * 20
    square, wide = 6 * 1000, 4 * 100 * 40 + 2 * 1000  # 4m²n + 2m³
    one = 5 * 2 * (3 * square + square + 2 * wide) / 0.5e14
    assert job.muon_seconds(machine, 1) == pytest.approx(one)
    assert job.muon_seconds(machine, 2) == job.muon_seconds(machine, 64) == pytest.approx(one / 2)  # a matrix is not cut
    predict = module["predict"]
    assert predict(job, machine, 1, 100).waited == 0.0
    assert module["efficiency"](job, machine, 1, 100, 100) == 1.0
    gpt2 = module["GPT2"]
    tokens = module["break_even_tokens"](machine, 4, "ddp")
    bare = module["Job"](layers=12, width=768, vocab=0, context=0)
    step = predict(bare, machine, 4, round(tokens))
    assert step.exchange - machine.all_gather(2 * bare.matrices, 4) == pytest.approx(2 / 3 * step.compute, rel=1e-3)
    assert 160e6 < gpt2.parameters < 165e6


def test_the_scaling_model_is_checked_against_what_was_measured():
    module = runpy.run_path(str(DOCS / "scaling_model.py"))
    records = scaling_records()
    machine, measured = module["from_records"](records)
    assert 1000 * measured["per_token"] == pytest.approx(0.09)
    assert (machine.link, machine.link_latency) == (300e9, pytest.approx(10e-6))
    points = [r for r in records if r["kind"] == "weak" and r["processes"] > 1]
    fitted = module["fit_contention"](machine, measured, points)
    step = module["predict_record"](points[-1], fitted, measured)
    assert step.seconds == pytest.approx(1 / 9)  # the point that it was fitted to


def test_the_predictions_in_the_documentation_are_the_models():
    module = runpy.run_path(str(DOCS / "scaling_model.py"))
    text = (DOCS / "scaling.md").read_text(encoding="utf-8")
    told = text.split("<!-- MODEL -->\n")[1].split("\n<!-- END MODEL -->")[0]
    assert told == module["tables"](module["Machine"]())


@pytest.mark.integration
def test_scaling_runs_over_gloo_with_every_part():
    """A benchmark that is first tried on a rented host."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "scaling.py"), "--smoke", "--steps", "1", "--repeats", "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["troubles"] == {}
    assert "train.parallel=fsdp" in result["large_on_one_gpu"]
    names = [figure["name"] for figure in result["figures"]]
    for parallel in ("ddp", "fsdp"):
        (gap,) = [f for f in result["figures"] if f["name"] == f"largest distance to one GPU's losses: 2 GPUs, {parallel}"]
        assert gap["ours"] < 1e-4
        assert f"strong communication share: 2 GPUs, {parallel}" in names
        assert f"weak efficiency: 2 GPUs, {parallel}" in names
    assert "large model, part of the memory: 2 GPUs, fsdp" in names

"""The study engine with a toy measurement: what is kept, what fails alone, what resumes, what a report says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from gptcore.checkpoint import check_checkpoint
from gptcore.config import UserError, check_config, with_changes
from gptcore.config.base import Section
from gptcore.config.study import StudyPlan, find_study, load_study, write_plan
from gptcore.entry import StopFlag
from gptcore.errors import Stopped
from gptcore.journal import NoJournal, read_journal
from gptcore.report.study import table
from gptcore.shards import ShardSet, prepare
from gptcore.store import read_json
from gptcore.studies import Bench, CellResult, Study, Summary, engine, training
from gptcore.studies.__main__ import run_parts
from gptcore.studies.engine import run_cells
from gptcore.studies.finish import finish
from gptcore.studies.publish import publish
from gptcore.studies.statistics import comparison_note, mean_interval, paired, ratio_interval
from gptcore.timing import format_seconds
from gptcore.train import build_trainer, gradient_check
from gptcore.train.loop import Best

ROOT = Path(__file__).parent.parent
BASE = {
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16},
    "train": {
        "device": "cpu",
        "global_batch_size": 4,
        "max_steps": 4,
        "warmup_steps": 1,
        "eval_interval": 2,
        "log_interval": 1,
    },
}
TOY = {
    "study": "accumulation",
    "question": "Does the engine do what it says?",
    "base": "base.yaml",
    "arms": [{"name": "a"}, {"name": "b", "options": {"value": 2.0}}],
    "seeds": [1, 2],
    "smoke": {"seeds": [7], "changes": {"train": {"max_steps": 2}}},
}


class Options(Section):
    value: float = 1.0
    fail: bool = False


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The toy study in the engine's hands; returns the names of the cells that were measured."""
    measured: list[str] = []

    def measure(cell: engine.Cell, bench: Bench) -> CellResult:
        measured.append(cell.name)
        if cell.options.fail and cell.seed == 1:
            raise UserError("the toy broke")
        (bench.out / "note.txt").write_text(cell.name)
        bench.journal.metrics({"toy/point": 1.0}, tokens_seen=5)
        return CellResult([{"value": cell.options.value + cell.seed}], metrics={"toy/value": 3.0}, files=("note.txt",))

    def summarize(results: engine.Results) -> Summary:
        rows = results.table()
        block = table("values", rows, "all", styles={"value": ".2f"})
        return Summary(f"mean {rows['value'].mean():.2f} of {len(rows)}", ["one finding"], [block], {"extra": rows})

    monkeypatch.setattr(engine, "find", lambda _name: Study("Toy", Options, measure, summarize))
    monkeypatch.setattr("gptcore.studies.finish.find", lambda _name: Study("Toy", Options, measure, summarize))
    return measured


@pytest.fixture(scope="module")
def shards(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    config = load_study(_write(tmp_path_factory.mktemp("plan"), TOY, small_text)).base
    return ShardSet.open(prepare(config, tmp_path_factory.mktemp("home")).shards)


def _write(folder: Path, study: dict, text: Path | None = None, **changes: object) -> Path:
    base = {**BASE, **({"data": {"source": str(text)}} if text else {})}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "toy.yaml").write_text(yaml.safe_dump({**study, **changes}))
    return folder / "toy.yaml"


def _run(plan: StudyPlan, shards: ShardSet, out: Path) -> list[dict]:
    write_plan(plan, out)
    return run_cells(plan, shards, out / "cells" / "0", out.name, None)


def test_a_study_file_becomes_cells(tmp_path: Path) -> None:
    path = _write(tmp_path, TOY, grid={"train.beta2": [0.9, 0.99], "options.value": [5]})
    plan = load_study(path, ["train.lr=0.01", "options.fail=true", "study.minutes=2"])
    assert len(plan.cells) == 2 * 2 * 2
    assert len({cell.name for cell in plan.cells}) == 8
    first = plan.cells[0]
    assert (first.arm, first.seed, first.config.train.seed, first.config.train.beta2) == ("a", 1, 1, 0.9)
    assert first.factors == {"train.beta2": 0.9, "options.value": 5}
    assert first.options == {"value": 5, "fail": True}
    assert (first.config.train.lr, plan.config.minutes) == (0.01, 2)
    smoke = load_study(path, smoke=True)
    assert {cell.seed for cell in smoke.cells} == {7}
    assert smoke.base.train.max_steps == 2
    written = load_study(write_plan(plan, tmp_path / "run"))
    assert [(c.name, c.config.train, c.options) for c in written.cells] == [
        (c.name, c.config.train, c.options) for c in plan.cells
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"question": None}, "question"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"arms": [{"name": "a"}, {"name": "a"}]}, "same name"),
        ({"baseline": "c"}, "no such arm"),
        ({"grid": {"lr": [1]}}, "section.field"),
        ({"arms": [{"name": "a", "changes": {"data": {"split": "tail"}}}]}, "share one text"),
        ({"arms": [{"name": "a", "changes": {"trian": {}}}]}, "unknown section 'trian'"),
        ({"grid": {"train.lr": [-1]}}, "train.lr=-1"),
    ],
)
def test_a_mistake_in_a_study_file_is_named(tmp_path: Path, changes: dict, said: str) -> None:
    path = _write(tmp_path, TOY, **changes)
    with pytest.raises(UserError, match=said) as error:
        load_study(path)
    assert "toy.yaml" in str(error.value)


def test_unknown_options_and_studies_are_refused(tmp_path: Path, calls: list[str]) -> None:
    plan = load_study(_write(tmp_path, TOY), ["options.speed=1"])
    with pytest.raises(UserError, match=r"arm a: options\.speed=1: unknown; known options: value, fail"):
        engine.check_options(plan)
    with pytest.raises(UserError, match="study 'tming'"):
        find_study("tming")


@pytest.mark.integration
def test_finished_cells_are_kept_and_only_what_changed_is_measured(tmp_path: Path, calls: list[str], shards: ShardSet) -> None:
    path = _write(tmp_path, TOY)
    _run(load_study(path), shards, tmp_path / "one")
    assert calls == ["a-seed1", "a-seed2", "b-seed1", "b-seed2"]
    calls.clear()
    again = _run(load_study(path, ["study.seeds=[1,2,3]"]), shards, tmp_path / "two")
    assert calls == ["a-seed3", "b-seed3"]
    assert [cell["status"] for cell in again] == ["cached", "cached", "done", "cached", "cached", "done"]
    folder = tmp_path / "two" / "cells" / "0" / "a-seed1"
    assert (folder / "note.txt").read_text() == "a-seed1"
    lines = read_journal(folder / "metrics.jsonl")[0]  # its curve is told again, so that MLflow can compare
    assert {"toy/point": 1.0} in [line["values"] for line in lines if line["kind"] == "metrics"]
    assert lines[-1]["status"] == "FINISHED"
    calls.clear()
    _run(load_study(path, ["train.lr=0.5", "study.seeds=[1]"]), shards, tmp_path / "three")
    assert calls == ["a-seed1", "b-seed1"]


@pytest.mark.integration
def test_one_failing_cell_leaves_the_others_and_a_report_that_says_so(
    tmp_path: Path, calls: list[str], shards: ShardSet
) -> None:
    arms = [{"name": "a"}, {"name": "b", "options": {"fail": True}}]
    out = tmp_path / "run"
    records = _run(load_study(_write(tmp_path, TOY, arms=arms)), shards, out)
    assert [cell["status"] for cell in records] == ["done", "done", "failed", "done"]
    assert records[2]["rows"] == []
    assert read_journal(out / "cells" / "0" / "b-seed1" / "metrics.jsonl")[0][-1]["status"] == "FAILED"
    result = finish(out)
    assert (result["cells"], result["failed"], result["conclusion"]) == (4, 1, "mean 2.67 of 3")
    html = (out / "report.html").read_text()
    assert "1 of 4 cells failed" in html
    assert "the toy broke" in html
    assert len(pd.read_csv(out / "tables" / "results.csv")) == len(pd.read_parquet(out / "tables" / "extra.parquet")) == 3
    assert "mean 2.67 of 3" in (out / "log_entry.md").read_text()
    calls.clear()
    _run(load_study(tmp_path / "toy.yaml"), shards, tmp_path / "again")
    assert calls == ["b-seed1"], "a failure was kept as if it were a result"


def test_a_killed_study_goes_on_with_the_next_cell(
    tmp_path: Path, calls: list[str], shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = load_study(_write(tmp_path, TOY))
    monkeypatch.setattr(engine.Deadline, "is_asked", property(lambda _self: len(calls) >= 2))
    with pytest.raises(Stopped, match="2 of 4 cells"):
        _run(plan, shards, tmp_path / "one")
    monkeypatch.undo()
    assert finish_counts(tmp_path / "one", plan) == {"done": 2, "not run": 2}


def finish_counts(out: Path, plan: StudyPlan) -> dict[str, int]:
    states = [cell["status"] for cell in engine.read_cells(out, plan)]
    return {state: states.count(state) for state in dict.fromkeys(states)}


def test_no_cell_begins_after_the_budget(tmp_path: Path, calls: list[str], shards: ShardSet) -> None:
    out = tmp_path / "run"
    _run(load_study(_write(tmp_path, TOY), ["study.minutes=0.000001"]), shards, out)
    assert calls == []
    assert finish(out)["conclusion"] == "Nothing was measured; the time was over before the first."
    assert "4 of 4 cells were not measured" in (out / "report.html").read_text()


@pytest.mark.integration
def test_parts_are_measured_by_processes_of_their_own(small_text: Path, home: Path, tmp_path: Path) -> None:
    plan = load_study(find_study("accumulation"), [f"data.source={small_text}", "train.device=cpu"], smoke=True)
    plan = load_study(
        write_plan(plan, tmp_path / "run"),
        ["study.arms=[{name: a, options: {kind: economy}}]", "study.seeds=[1, 2]", "options.repeats=1"],
    )
    study = write_plan(plan, tmp_path / "run")
    shards = prepare(plan.base, home).shards
    run_parts(study, shards, tmp_path / "run" / "cells", "run", 2)
    assert [len(list((tmp_path / "run" / "cells" / part).glob("*/cell.json"))) for part in "01"] == [1, 1]
    assert {cell["status"] for cell in engine.read_cells(tmp_path / "run", plan)} == {"done"}
    with pytest.raises(RuntimeError, match=r"exit codes \[2, 2\]"):
        run_parts(study, tmp_path / "nothing", tmp_path / "run" / "cells", "run", 2)


@pytest.mark.integration
def test_a_training_is_shared_between_cells(
    tmp_path: Path, shards: ShardSet, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(cell: engine.Cell, bench: Bench) -> CellResult:
        trained = bench.train(cell.config)
        curve = trained.curve("val/bpb")
        assert [point[0] for point in curve] == [0, 2 * 64, 4 * 64]
        assert curve[0][1] == 0 < curve[1][1] < curve[2][1]
        return CellResult([{"bpb": trained.result["val_bpb"]}])

    monkeypatch.setattr(engine, "find", lambda _name: Study("Toy", Options, measure, lambda _results: Summary("")))
    one, two = _run(load_study(_write(tmp_path, TOY, seeds=[1])), shards, tmp_path / "run")
    assert (one["status"], two["status"]) == ("done", "done"), one["reason"] + two["reason"]
    assert one["rows"] == two["rows"]
    assert len(list((home / "studies" / "trainings").iterdir())) == 1
    for cell in ("a-seed1", "b-seed1"):
        lines = read_journal(tmp_path / "run" / "cells" / "0" / cell / "metrics.jsonl")[0]
        assert any("val/bpb" in line.get("values", {}) for line in lines), "a shared training's curve is missing"


@pytest.mark.parametrize(("select", "lost"), [("last", 4), ("best", 2)])
@pytest.mark.parametrize("how", ["deleted", "cut"])
def test_a_training_whose_checkpoint_is_lost_is_trained_once_more(
    tmp_path: Path, shards: ShardSet, home: Path, monkeypatch: pytest.MonkeyPatch, how: str, select: str, lost: int
) -> None:
    """Its result said that it is over, and every study that asked for its weights ended with `no such directory`."""
    plan = load_study(_write(tmp_path, TOY))
    config = with_changes(plan.base, train={"select": select, "eval_interval": 2, "save_interval": 2, "keep_checkpoints": 9})
    take = Best.take
    monkeypatch.setattr(Best, "take", lambda self, *args: self.bpb is None and take(self, *args))  # the first is the best
    first = training.train(config, shards, home, NoJournal(), StopFlag())
    assert first.checkpoint.name == f"step_{lost:06d}"
    if how == "deleted":
        shutil.rmtree(first.checkpoint)
    else:
        (first.checkpoint / "model.safetensors").write_bytes(b"")
    again = training.train(config, shards, home, NoJournal(), StopFlag())
    check_checkpoint(again.checkpoint)
    assert (again.checkpoint, again.result["val_loss"]) == (first.checkpoint, first.result["val_loss"])


def test_the_study_files_of_the_repository_are_valid() -> None:
    files = sorted((ROOT / "experiments" / "studies").glob("*.yaml"))
    assert files
    for file in files:
        for smoke in (False, True):
            engine.check_options(load_study(file, smoke=smoke))


def test_what_is_left_is_told_by_arm() -> None:
    records = [
        {"arm": "quick", "status": "done", "seconds": 1.0},
        {"arm": "quick", "status": "cached", "seconds": 3.0},
        {"arm": "slow", "status": "failed", "seconds": 0.1},
    ]
    told = engine.describe_left(["quick", "quick", "slow"], records)
    assert told == f", about {format_seconds(4)} left and 1 cell of arms not measured yet"
    records.append({"arm": "slow", "status": "done", "seconds": 100.0})
    assert engine.describe_left(["quick", "slow"], records) == f", about {format_seconds(102)} left"
    assert engine.describe_left(["other", "other"], records) == ", 2 cells of arms not measured yet"
    assert engine.describe_left([], records) == ""


def test_intervals() -> None:
    one, three, six = mean_interval([2.0]), mean_interval([1, 2, 3]), mean_interval([1.0, 2, 3, 4, 5, 6])
    assert one.n == 1
    assert "no interval" in one.text()
    assert three.low == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-4)  # Student's t with 2 degrees of freedom
    assert 1 <= six.low < 2
    assert 5 < six.high <= 6
    assert ratio_interval([2.0, 8.0]).mean == pytest.approx(4)
    with pytest.raises(AssertionError, match="not measured"):
        mean_interval([1.0, float("nan")])


def test_pairing_by_seed_finds_a_difference_that_the_seeds_hide() -> None:
    seeds = range(6)
    rows = [{"arm": "base", "seed": s, "x": 10.0 * s} for s in seeds]
    rows += [{"arm": "better", "seed": s, "x": 10.0 * s - 1 + 0.01 * s} for s in seeds]
    rows += [{"arm": "same", "seed": s, "x": 10.0 * s + (-1) ** s} for s in seeds] + [{"arm": "lonely", "seed": 99, "x": 1.0}]
    frame = paired(pd.DataFrame(rows), "x", "base").set_index("arm")
    assert list(frame.index) == ["better", "same"]
    assert frame.loc["better", "difference"] == pytest.approx(-0.975)
    assert frame["certain"].tolist() == [True, False]
    assert "2 comparisons with base" in comparison_note(frame.reset_index(), "base")


def test_tables_keep_whole_numbers_and_show_what_is_missing() -> None:
    frame = pd.DataFrame({"arm": ["x"], "n": [3], "v": [1.5], "v_low": [1.0], "v_high": [2.0], "gone": [None]})
    html = table("t", frame, "c", styles={"v": ".1f", "n": "d"})
    assert "1.5 (1.0 to 2.0)" in html
    assert ">3<" in html
    assert ">–<" in html
    json.dumps(str(html))


def test_every_training_has_a_gradient_check_that_can_fail(
    shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {**BASE, "model": {**BASE["model"], "dropout": 0.3}, "train": {**BASE["train"], "micro_batch_size": 4}}
    trainer = build_trainer(check_config(tree), shards)
    before = torch.get_rng_state()
    found = gradient_check.write_gradient_check(trainer, tmp_path)
    assert found == json.loads((tmp_path / "accumulation.json").read_text())
    assert found["passed"]
    assert found["error"] < 1e-6
    assert torch.equal(torch.get_rng_state(), before)
    assert trainer.model.training
    assert all(p.grad is None for p in trainer.model.parameters())
    # The mistake it guards against: each micro-step's mean instead of its part of the whole.
    forward = type(trainer.model).forward
    wrong = lambda self, x, y=None, *, reduction="mean", **_: forward(self, x, y, reduction="mean")  # noqa: E731
    monkeypatch.setattr(type(trainer.model), "forward", wrong)
    assert not gradient_check.check_gradient(trainer)["passed"]


def test_the_gradient_check_names_the_precision_it_was_computed_in(shards: ShardSet) -> None:
    """Evaluation mode turns fp8 off: what was called fp8, and allowed to be off by a half, was bf16."""
    trainer = build_trainer(check_config({**BASE, "train": {**BASE["train"], "micro_batch_size": 4}}), shards)
    trainer.device = replace(trainer.device, precision="fp8")
    found = gradient_check.check_gradient(trainer)
    assert (found["precision"], found["limit"]) == ("bf16", gradient_check.LIMITS["bf16"])


@pytest.mark.integration
def test_a_result_is_published_once(
    tmp_path: Path, calls: list[str], shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptcore.studies.publish.BROWSERS", ())
    out, docs, log = tmp_path / "run", tmp_path / "docs", tmp_path / "LOG.md"
    log.write_text("# Log\n\nNewest first.\n\n## 2026-01-01 · old\n\ntext\n")
    _run(load_study(_write(tmp_path, TOY)), shards, out)
    finish(out, command="gptloom study toy")
    assert publish(out, docs, log, "toy")["logged"]
    assert not publish(out, docs, log, "toy")["logged"]
    text = log.read_text()
    assert text.startswith("# Log\n\nNewest first.\n\n## ")
    assert text.index("Toy") < text.index("old")
    page = (docs / "toy.md").read_text()
    assert "**mean 3.00 of 4**" in page
    assert "`gptloom study toy`" in page
    assert "| a | 1 | 2 |" in page
    assert (docs / "toy" / "results.csv").is_file()
    (out / "result.json").write_text(json.dumps(read_json(out / "result.json") | {"not_run": 1}))
    with pytest.raises(UserError, match="1 of 4 cells were not measured"):
        publish(out, docs, log, "toy")

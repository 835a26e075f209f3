"""The timing map's clock against time that is known, its rules, and the difference of two runs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from gptcore.config import ModelConfig
from gptcore.config.study import load_study
from gptcore.models import build_model
from gptcore.studies.engine import CELL_FILE
from gptcore.studies.timing.advice import advise_pipeline, advise_step
from gptcore.studies.timing.difference import compare, conclude, main, section_times
from gptcore.studies.timing.peaks import _covered
from gptcore.studies.timing.pipeline import check_sum
from gptcore.studies.timing.sections import COLLECTION, sections, trains
from gptcore.studies.timing.step import _section_rows
from gptcore.studies.timing.summary import inclusive_shares, nodes
from gptcore.timing import MapClock


def test_the_map_keeps_nested_time_apart_and_adds_up_to_another_clock() -> None:
    clock, began = MapClock(), time.time()
    with clock.phase("all"):
        with clock.phase("step"):
            time.sleep(0.02)
            with clock.phase("forward"):
                time.sleep(0.04)
        with clock.phase("evaluate"), clock.phase("forward"):
            time.sleep(0.02)
    wall = time.time() - began
    assert sum(clock.paths.values()) == pytest.approx(wall, rel=0.03)
    assert clock.paths["all", "step", "forward"] >= 0.04
    assert clock.paths["all", "evaluate", "forward"] >= 0.02
    assert 0.02 <= clock.paths["all", "step"] < clock.paths["all", "step", "forward"], (
        "an outer phase holds its inner one's time"
    )
    assert clock.calls["all", "step", "forward"] == 1
    assert sum(clock.cpu_seconds.values()) < 0.5 * wall, "sleeping is not computing"
    check_sum(sum(clock.paths.values()), wall, 0.03)
    with pytest.raises(RuntimeError, match="missing or double"):
        check_sum(0.9, 1.0, 0.03)


def test_sections_of_a_step_add_up_to_its_mean() -> None:
    """Means do; medians, which they were said to be, do not."""
    maps = [{("rest",): a, ("rest", "forward"): b} for a, b in ((1.0, 5.0), (2.0, 1.0), (9.0, 3.0))]
    rows = _section_rows(maps)
    assert sum(row["ms"] for row in rows) == pytest.approx(1e3 * 21 / 3)


@pytest.mark.parametrize("family", ["lstm", "gru", "mingru"])
def test_recurrence_and_loss_have_their_place_in_the_map(family: str) -> None:
    """The one was looked for under a name that no model has, the other in the wrong file."""
    model = build_model(ModelConfig(family=family, n_layer=1, n_embd=16, block_size=8), 11)
    clock = MapClock()
    with sections(model, clock):
        model(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64))
    rest = {"norm", "convolution"} if family == "mingru" else set()
    assert {path[-1] for path in clock.paths} - {COLLECTION} == {"embedding", "recurrence", "head", "loss"} | rest


def test_evaluation_trains_nothing() -> None:
    assert trains(("pipeline", "train", "forward", "attention"))
    assert not trains(("pipeline", "train", "evaluate", "forward"))
    assert not trains(("pipeline", "train", "save"))


def test_shares_include_what_is_inside_and_the_tree_is_whole() -> None:
    mean = pd.DataFrame({"section": ["p", "p / a", "p / a / b", "p / c"], "seconds": [1.0, 2.0, 3.0, 4.0]})
    assert inclusive_shares(mean) == pytest.approx({"a": 0.5, "a / b": 0.3, "c": 0.4})
    tree = nodes(mean).set_index("id")["seconds"]
    assert tree["p"] == 10
    assert tree["p / a"] == 5
    assert tree["p / a / itself"] == 2
    children = nodes(mean).groupby("parent")["seconds"].sum()  # plotly refuses a parent smaller than its children
    assert all(children[key] == pytest.approx(tree[key]) for key in ("p", "p / a"))


def test_advice_speaks_only_when_its_number_is_reached() -> None:
    calm = {"of_peak": 0.9, "us_per_operator": 500.0, "busy_share": None, "intensity": 50.0, "ridge": 10.0, "kernels": None}
    assert advise_step(calm, {"forward / attention": 0.5, "optimizer": 0.1}) == []
    told = advise_step({**calm, "busy_share": 0.4, "kernels": 900}, {"data": 0.2, "optimizer": 0.25})
    assert [("20 %" in told[0]), ("25 %" in told[1]), ("40 %" in told[2])] == [True, True, True]
    slow = advise_pipeline({"ingest": 0.6, "train": 0.3, "train / save": 0.1}, 0.8)
    assert "ingest with 60 %" in slow[0]
    assert "save_interval" in slow[1]
    assert advise_pipeline({"train": 0.9, "ingest": 0.1}, 0.2) == []


def test_the_difference_names_what_became_slower() -> None:
    rows = [
        {"arm": "base", "point": "", "section": s, "seed": n, "ms": ms + n}
        for s, ms in (("backward", 10.0), ("data", 1.0))
        for n in range(5)
    ]
    before = pd.DataFrame(rows)
    after = before.assign(ms=before["ms"] + (before["section"] == "backward") * (5 + 0.1 * before["seed"]))
    frame = compare(before, after)
    assert list(frame["section"]) == ["backward", "data"]
    assert "backward of base became slower most" in conclude(frame, "a", "b")
    assert "Nothing became slower" in conclude(compare(before, before), "a", "a")


def test_points_of_a_grid_are_compared_each_with_itself(tmp_path: Path) -> None:
    """One seed at two points was four pairs, and an interval that nobody measured."""
    study = {
        "study": "timing",
        "question": "Which is slower?",
        "base": "config.yaml",
        "grid": {"model.n_layer": [1, 2]},
        "seeds": [1],
    }
    runs = tmp_path / "a", tmp_path / "b"
    for run, slower in zip(runs, (0.0, 1.0), strict=True):
        run.mkdir()
        (run / "config.yaml").write_text("{}")
        (run / "study.yaml").write_text(yaml.safe_dump(study))
        for cell in load_study(run / "study.yaml").cells:
            rows = [{"section": "backward", "ms": 10 * cell.factors["model.n_layer"] + slower}]
            record = {"name": cell.name, "arm": cell.arm, "factors": cell.factors, "seed": cell.seed, "status": "done"}
            record |= {"rows": [{"kind": "step"}], "tables": {"sections": rows}}
            folder = run / "cells" / "0" / cell.name
            folder.mkdir(parents=True)
            (folder / CELL_FILE).write_text(json.dumps(record))
    frame = compare(*map(section_times, runs))
    assert list(frame["point"]) == ["model.n_layer=1", "model.n_layer=2"]
    assert list(frame["n"]) == [1, 1]
    assert list(frame["change"]) == [1, 1]
    result = main([*map(str, runs), str(tmp_path / "page.html")])
    assert result["sections"] == 2
    assert "base, model.n_layer=1: backward" in (tmp_path / "page.html").read_text()


def test_overlapping_kernels_count_once() -> None:
    assert _covered([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4

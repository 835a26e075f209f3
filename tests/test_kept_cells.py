"""Cells that an earlier version measured are found again: nobody measures twice what has been measured.

tests/data/kept_cell was committed by the code of 27 November 2026 (8f0e358), and the keys below were computed there. A field added to a
study's options, to the experiment file's sections model, train and evaluate, or another Study.version changes them: then every
kept cell is measured anew, which is right only where the numbers become others.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from gptcore.config.study import StudyPlan, load_study
from gptcore.device import Device
from gptcore.shards import ShardSet, prepare
from gptcore.studies import engine
from gptcore.studies.engine import cell_key, check_options, run_cells

CELL = Path(__file__).parent / "data" / "kept_cell"
DEVICE, TORCH = Device(torch.device("cpu"), "fp32", "AMD EPYC (2 threads)"), "2.13.0+cpu"
SHARDS = "bc66101b50f60aa0"
KEYS = {
    "accumulation": ({"kind": "economy", "micro_steps": [1, 2], "repeats": 1}, "3a0b6705f6e87eb4"),
    "timing": ({"repeats": 2}, "6448b367a9da3e26"),
    "quantization": ({}, "32835a5a237ccda9"),
    "rnn": ({}, "694a2314c0396c53"),
}


@pytest.fixture
def then(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The machine of that day, and a text like that day's."""
    monkeypatch.setattr(torch, "__version__", TORCH)
    monkeypatch.setattr(engine, "choose_device", lambda *_: DEVICE)
    monkeypatch.setenv("GPTLOOM_HOME", str(tmp_path / "home"))
    lines = (f"{i} times {i} is {i * i}, and {i} and {i} are {2 * i}.\n\n" for i in range(2000))
    (tmp_path / "text.txt").write_text("".join(lines))
    base = {
        "data": {"source": str(tmp_path / "text.txt")},
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16},
        "train": {"device": "cpu", "precision": "fp32", "global_batch_size": 4, "max_steps": 4, "warmup_steps": 1},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    return tmp_path


def plan_of(name: str, folder: Path) -> StudyPlan:
    question = "Is a kept cell found again?"
    study = {"study": name, "question": question, "base": "base.yaml", "seeds": [1], "options": KEYS[name][0]}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(study))
    return check_options(load_study(folder / f"{name}.yaml"))


def test_keys_are_those_of_then(then: Path) -> None:
    plans = {name: plan_of(name, then) for name in KEYS}
    shards = ShardSet.open(prepare(plans["timing"].base, then / "home").shards)
    assert shards.id == SHARDS, "the same text makes other shards now"
    found = {name: cell_key(plan, plan.cells[0], shards, DEVICE) for name, plan in plans.items()}
    assert found == {name: key for name, (_, key) in KEYS.items()}


def test_a_cell_of_then_is_taken(then: Path) -> None:
    plan = plan_of("accumulation", then)
    shutil.copytree(CELL, then / "home" / "studies" / "cells" / KEYS["accumulation"][1])
    shards = ShardSet.open(prepare(plan.base, then / "home").shards)
    (record,) = run_cells(plan, shards, then / "run" / "cells" / "0", "run", None)
    assert record["status"] == "cached", record["reason"]
    kept = json.loads((CELL / "cell.json").read_text())
    assert (record["rows"], record["seconds"]) == (kept["rows"], kept["seconds"])

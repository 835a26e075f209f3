"""Whole studies at smoke size: the verb with Prefect and MLflow, killed and called again, and the timing map on its own."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import ROOT, users_environment
from mlflow import MlflowClient

from gptloom.flows.command.cli import main

KEYS = {"run", "report", "cells", "measured", "cached", "failed", "not_run", "conclusion", "seconds", "mlflow_run_id"}


def start(home: Path, module: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *args],
        cwd=ROOT,
        env=users_environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result_of(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    out, err = process.communicate(timeout=280)
    lines = out.splitlines()
    assert len(lines) == 1, out + err
    return process.returncode, json.loads(lines[0]), err


@pytest.mark.integration
def test_a_killed_study_goes_on_without_repeating_finished_cells(home: Path, small_text: Path) -> None:
    args = ("accumulation", "--smoke", f"data.source={small_text}", "options.ranks=false", "study.seeds=[1]")
    first = start(home, "gptcore.studies", *args)  # the same cells, without the servers' time
    deadline = time.monotonic() + 200
    while not list(home.glob("runs/*/cells/0/*/cell.json")):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    code, result, err = result_of(first)
    assert code == 75, err
    assert "stopped" in result["error"]
    kept = len(list((home / "studies" / "cells").glob("*/COMMITTED")))
    assert kept >= 1

    code, result, err = result_of(start(home, "gptloom.flows.command.cli", "study", *args))
    assert code == 0, err
    assert set(result) >= KEYS
    assert (result["cells"], result["failed"], result["not_run"]) == (4, 0, 0)
    assert result["cached"] == kept
    assert result["measured"] == 4 - kept
    assert "float64" in result["conclusion"]
    run = home / "runs" / result["run"]
    rows = pd.read_parquet(run / "tables" / "exactness.parquet")
    exact = rows[(rows["precision"] == "fp64") & (rows["method"] == "ours")]
    assert exact["error"].max() < 1e-12
    naive = rows[(rows["method"] == "naive") & (rows["batch"] == "ragged") & (rows["micro_steps"] == 4)]
    assert naive["error"].min() > 1e-4, "a mean of means that is exact measures nothing"

    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    parent = client.get_run(result["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    found = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {child.data.tags["gptloom.arm"] for child in found} >= {"exactness", "economy"}
    assert len(found) == 4
    assert {f.path for f in client.list_artifacts(parent.info.run_id)} >= {"report.html", "study.yaml"}


@pytest.mark.integration
def test_the_timing_map_adds_up_and_draws_itself(home: Path, small_text: Path) -> None:
    args = ("timing", "--smoke", f"data.source={small_text}", "study.seeds=[1]", "train.device=cpu")
    code, result, err = result_of(start(home, "gptcore.studies", *args))
    assert code == 0, err
    assert (result["cells"], result["failed"]) == (3, 0), err
    run = home / "runs" / result["run"]
    mapped = pd.read_parquet(run / "tables" / "map.parquet")
    names = set(mapped["section"])
    for part in (
        "ingest",
        "vocabulary",
        "shards",
        "train / forward / attention",
        "train / forward / loss",
        "train / backward",
        "train / save",
        "train / data / to_device",
        "train / evaluate / head",
        "train / report",
        "report",
    ):
        assert f"pipeline / {part}" in names, f"{part} is missing in {sorted(names)}"
    assert mapped["seconds"].min() >= 0
    assert mapped["share"].sum() == pytest.approx(1)
    steps = pd.read_parquet(run / "tables" / "steps.parquet")
    assert (steps["profiler_gap"] < 0.5).all(), "the map's clock and the profiler's tell different stories"
    assert (steps["of_peak"].between(0, 1.2)).all()
    with gzip.open(next(run.glob("cells/0/base-seed1/trace.json.gz"))) as trace:
        assert any(event.get("name") == "phase: backward" for event in json.load(trace)["traceEvents"])
    html = (run / "report.html").read_text()
    for word in ("trains nothing", "sunburst", "roofline", "within 0."):
        assert word in html.lower()


def test_a_mistake_in_the_call_ends_at_once(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["tming"], "study 'tming': not known"),
        (["accumulation", "options.lr=1"], "arm exactness: options.lr=1: unknown"),
        (["accumulation", "--smoke", "train.lr=-1"], "train.lr=-1"),
    ):
        assert main(["study", *words]) == 2
        assert said in json.loads(capfd.readouterr().out)["error"]
    assert not home.exists(), "a mistake left something behind"

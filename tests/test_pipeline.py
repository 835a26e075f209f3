"""The main job end to end: the real command in a process of its own, looked at through MLflow's and Prefect's own records."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, users_environment
from mlflow import MlflowClient
from mlflow.entities import Run
from pydantic import BaseModel, ValidationError

from gptcore.checkpoint import FORMAT
from gptcore.config import ExperimentConfig, UserError, load_config
from gptcore.store import commit_dir
from gptloom.flows.forms import SHOWN, Overrides
from gptloom.flows.run import load_run

SMOKE = ROOT / "experiments" / "smoke.yaml"
CONTRACT = {"run", "flow_run_id", "mlflow_run_id", "val_loss", "val_bpb", "checkpoint", "report", "seconds"}
NESTED = {"train", "floor", "evaluate", "timing", "quantization", "accumulation", "rnn"}


def command(text: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "gptloom.flows.command.cli", "run", str(SMOKE), f"data.source={text}", *overrides]


def gptloom_run(home: Path, text: Path, *overrides: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON of stdout (which holds nothing else), stderr."""
    done = subprocess.run(
        command(text, *overrides), cwd=ROOT, env=users_environment(home), capture_output=True, text=True, timeout=400
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 1, done.stdout + done.stderr
    return done.returncode, json.loads(lines[0]), done.stderr


def runs_of(home: Path, experiment: str = "smoke") -> list[Run]:
    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id]))


def prefect_states(home: Path, table: str, flow_run_id: str | None = None) -> dict[str, str]:
    """Name → state, straight from Prefect's database: its temporary server is gone by now."""
    column = "flow_run_id" if table == "task_run" else "id"
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        rows = database.execute(f"select name, state_name, {column} from {table}").fetchall()
    return {name: state for name, state, key in rows if flow_run_id is None or key == flow_run_id}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, small_text: Path) -> tuple[Path, dict[str, Any], str]:
    """A whole run in a new home: (home, result, stderr)."""
    home = tmp_path_factory.mktemp("pipeline") / "home"
    code, result, err = gptloom_run(home, small_text)
    assert code == 0, err
    return home, result, err


@pytest.mark.integration
@pytest.mark.timeout(500)
def test_command_contract(first: tuple[Path, dict[str, Any], str]) -> None:
    home, result, err = first
    assert set(result) == CONTRACT
    assert (Path(result["checkpoint"]) / "COMMITTED").is_file()
    assert Path(result["report"]) == home / "runs" / result["run"] / "report.html"
    assert Path(result["report"]).stat().st_size > 10_000
    assert set(result["seconds"]) == NESTED | {"ingest", "vocabulary", "shards", "register", "report"}
    assert 0 < result["val_bpb"] < 8
    for word in ("GPT", "LSTM", "bigram", "int8"):  # the table for people
        assert word in err
    assert "Error" not in err


@pytest.mark.integration
def test_mlflow_shows_the_whole_run(first: tuple[Path, dict[str, Any], str]) -> None:
    home, result, _ = first
    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    runs = {run.data.tags["gptloom.run"]: run for run in runs_of(home)}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent = runs[result["run"]]
    assert parent.info.run_id == result["mlflow_run_id"]
    nested = [run for run in runs.values() if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.data.tags["gptloom.run"] for run in nested} == {f"{result['run']}/{step}" for step in NESTED}

    assert parent.data.params["model.n_layer"] == "2"
    assert parent.data.metrics["val/bpb"] == pytest.approx(result["val_bpb"])
    assert {"gptloom.host", "gptloom.version", "gptloom.device"} <= set(parent.data.tags)
    assert parent.data.tags["prefect.flow_run_id"] == result["flow_run_id"]
    (corpus,) = (home / "data" / "corpora").iterdir()
    assert parent.inputs.dataset_inputs[0].dataset.digest == corpus.name
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"config.yaml", "report.html", "tokenizer.json", "samples.json"} <= artifacts

    train = runs[f"{result['run']}/train"]
    assert train.data.params
    assert {file.path for file in client.list_artifacts(train.info.run_id)} >= {"checkpoint"}
    loss = client.get_metric_history(train.info.run_id, "train/loss")
    steps = [point.step for point in loss]
    assert len(steps) > 3
    assert steps == sorted(set(steps)), "an x value appears twice"
    config = load_config(home / "runs" / result["run"] / "config.yaml")
    assert steps[-1] == config.train.max_steps * config.train.global_batch_size * config.model.block_size


@pytest.mark.integration
def test_prefect_shows_every_step(first: tuple[Path, dict[str, Any], str]) -> None:
    home, result, _ = first
    assert prefect_states(home, "flow_run") == {result["run"]: "Completed"}
    tasks = prefect_states(home, "task_run")
    assert set(tasks.values()) == {"Completed"}
    assert {"ingest small.txt", "build char vocabulary", "train gpt, 80 steps", "write the report"} <= set(tasks)
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        keys = {key for (key,) in database.execute("select key from artifact")}
    assert {"train-progress", "report", "curves", "corpus-statistics"} <= keys


@pytest.mark.integration
def test_second_run_reuses_the_data(first: tuple[Path, dict[str, Any], str], small_text: Path) -> None:
    """The same text again: the directories are found by content, the log and Prefect's states say so, the loss is the same."""
    home, before, _ = first
    switches = [f"studies.{name}=false" for name in ("floor", "timing", "quantization", "accumulation", "rnn")]
    code, result, err = gptloom_run(home, small_text, *switches)
    assert code == 0, err
    assert result["run"] != before["run"]
    assert result["val_loss"] == before["val_loss"]
    assert err.count("nothing to do") == 3
    states = sorted(prefect_states(home, "task_run").values())
    assert states.count("Cached") == 3
    assert set(result["seconds"]) == {"ingest", "vocabulary", "shards", "train", "evaluate", "register", "report"}
    for kind in ("corpora", "vocabs", "shards"):
        assert len(list((home / "data" / kind).iterdir())) == 1


@pytest.mark.integration
def test_failing_step_closes_its_runs(first: tuple[Path, dict[str, Any], str], small_text: Path, tmp_path: Path) -> None:
    """A mistake found inside a task: one sentence, exit 2, and the parent run FAILED with that reason."""
    home = first[0]
    code, result, err = gptloom_run(home, small_text, "model.block_size=50000", "name=broken")
    assert code == 2
    assert set(result) == {"run", "error"}
    assert "block_size" in result["error"]
    assert "Traceback" not in err
    (parent,) = runs_of(home, "broken")
    assert (parent.info.status, parent.data.tags["gptloom.reason"]) == ("FAILED", result["error"])
    assert prefect_states(home, "flow_run")[result["run"]] == "Failed"
    # Prefect writes a failed task's exception down, by default as a pickle.
    for file in (home / "prefect" / "storage").rglob("*"):
        assert not file.is_file() or json.loads(file.read_text()), file


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_leaves_nothing_running(
    first: tuple[Path, dict[str, Any], str], small_text: Path, number: signal.Signals
) -> None:
    """As a terminal's Ctrl-C is, and a supervisor's SIGTERM: Prefect's temporary server must still note how the run ended."""
    home = first[0]
    process = subprocess.Popen(
        command(small_text, "train.max_steps=1000000", f"name={number.name.lower()}"),
        cwd=ROOT,
        env=users_environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not list((home / "runs").glob(f"{number.name.lower()}-*/train/checkpoints/*/COMMITTED")):
            assert time.monotonic() < deadline, "the training never began"
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, number)
        out, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result = json.loads(out)
    assert process.returncode == 75
    assert set(result) == {"run", "error"}
    runs = {run.data.tags["gptloom.run"]: run for run in runs_of(home, number.name.lower())}
    assert {name: run.info.status for name, run in runs.items()} == {
        result["run"]: "KILLED",
        f"{result['run']}/train": "KILLED",
    }
    assert "checkpoint" in runs[f"{result['run']}/train"].data.tags["gptloom.reason"]
    assert prefect_states(home, "flow_run")[result["run"]] == "Cancelled"


# --- parts of the flow, without servers ---------------------------------------------------------------------------------


def test_settings_of_a_training_that_has_begun_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before the run's config is written anew: a plain --resume would be refused, too, from then on."""
    monkeypatch.setenv("GPTLOOM_HOME", str(tmp_path))
    directory = tmp_path / "runs" / "toy-1"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("name: toy\ntrain: {max_steps: 300}\n")
    assert load_run("toy-1", ["train.max_steps=400"]).train.max_steps == 400
    with commit_dir(directory / "train" / "checkpoints" / "step_000100", {}):
        pass
    with pytest.raises(UserError, match=r"run toy-1: .*train\.max_steps: 300 there, 400 now.* resume it without"):
        load_run("toy-1", ["train.max_steps=400"])
    assert load_run("toy-1", ["train.save_interval=50"]).train.save_interval == 50


def test_form_becomes_overrides(tmp_path: Path) -> None:
    """Every field of the Prefect form must land in the field that its description names."""
    path = tmp_path / "toy.yaml"
    path.write_text("")
    values: dict[str, Any] = {
        "data_source": "a=b.txt",
        "max_steps": 7,
        "n_layer": 3,
        "n_head": 2,
        "n_embd": 24,
        "block_size": 12,
        "lr": 0.5,
        "global_batch_size": 8,
        "device": "cpu",
        "seed": 9,
        "floor": False,
        "timing": False,
        "quantization": False,
        "accumulation": False,
        "rnn": False,
    }
    assert set(values) | {"more"} == set(Overrides.model_fields)
    config = load_config(path, Overrides(**values, more=["train.warmup_steps=1"]).as_list())
    for name, value in values.items():
        section, _, field = (Overrides.model_fields[name].description or "").partition(":")[0].partition(".")
        assert getattr(getattr(config, section), field) == value, name
    assert config.train.warmup_steps == 1
    assert load_config(path, Overrides().as_list()) == ExperimentConfig(name="toy")


def test_form_and_configuration_agree() -> None:
    """The form took lr=50 and n_head=5000, which the configuration refuses: two homes of one rule part ways."""
    form = Overrides.model_json_schema()["properties"]
    assert set(form) == {*SHOWN, "more"}
    rules = ("type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    for name, where in SHOWN.items():
        section, field = where.split(".")
        kind: Any = ExperimentConfig.model_fields[section].annotation

        def is_taken(value: Any, model: type[BaseModel], field: str) -> bool:
            """Whatever the other fields would say to it."""
            try:
                model.model_validate({field: value})
            except ValidationError as refused:
                return not any(error["loc"][:1] == (field,) for error in refused.errors())
            return True

        config = kind.model_json_schema()["properties"][field]
        shown = form[name]
        assert shown["title"] == config["title"], name  # with its unit
        assert shown["description"] == f"{where}: {config['description']}"
        own, theirs = (schema.get("anyOf", [schema])[0] for schema in (shown, config))
        assert {rule: own.get(rule) for rule in rules} == {rule: theirs.get(rule) for rule in rules}, name
        values: list[Any] = [None, "", "nonsense", True, 0, -1, 2**63, float("nan"), float("inf"), *own.get("enum", [])]
        for rule in rules[2:]:
            if (bound := own.get(rule)) is not None:
                steps = (1, -1) if own["type"] == "integer" else (bound * 1e-9 + 1e-12, -bound * 1e-9 - 1e-12)
                values += [bound, *(bound + step for step in steps)]
        if where == "data.source":
            values += ["a.txt", "https://me:hunter2@host/a.txt"]
        for value in values[1:]:
            assert is_taken(value, Overrides, name) == is_taken(value, kind, field), f"{name}={value!r}"
        assert is_taken(None, Overrides, name)  # empty: the file's
    for said in ({"lr": 50}, {"n_head": 5000}):
        with pytest.raises(ValidationError):
            Overrides(**said)


def test_form_and_page_say_what_is_read_of_a_folder() -> None:
    (line,) = (text for text in (ROOT / "README.md").read_text().splitlines() if "data.source=my_folder/" in text)
    said = Overrides.model_fields["data_source"].description or ""
    for extension in ExperimentConfig(name="toy").data.formats:
        assert f".{extension}" in line
        assert f" {extension}" in said


def test_page_names_a_command_that_generates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from gptcore import generate

    (line,) = (text for text in (ROOT / "README.md").read_text().splitlines() if "-m gptcore.generate CHECKPOINT" in text)
    checkpoint = tmp_path / "step_000001"
    with commit_dir(checkpoint, {"kind": "checkpoint", "format": FORMAT}) as tmp:
        (tmp / "config.yaml").write_text("name: toy\n")
    monkeypatch.setattr(generate, "write_samples", lambda *args: {"told": args[1:3], "samples": []})
    words = shlex.split(line.partition("gptcore.generate ")[2].replace("CHECKPOINT", str(checkpoint)))
    assert generate.main(words)["told"] == (checkpoint, "ROMEO:")


def test_form_shows_typed_inputs() -> None:
    """Prefect draws `int | None` as a choice between two types; a plain input with its bounds is what people expect."""
    from prefect.utilities.callables import parameter_schema

    from gptloom.flows.pipeline import pipeline

    schema = parameter_schema(pipeline).model_dump()
    steps = schema["definitions"]["Overrides"]["properties"]["max_steps"]
    assert (steps["type"], steps["minimum"]) == ("integer", 1)
    assert steps["description"]
    assert "default" not in steps
    assert schema["properties"]["overrides"]["default"] == {"more": []}
    assert schema["properties"]["experiment"]["description"]
    assert schema["properties"]["experiment"]["title"] == "Experiment"


def test_every_form_has_titles() -> None:
    """Prefect titles a parameter by its name in the code; people should not have to read code."""
    from prefect.utilities.callables import parameter_schema

    from gptloom.flows import budget, data, nightly, pipeline, reconcile, registry, steps, study

    flows = (
        budget.budget,
        data.data,
        nightly.nightly,
        pipeline.pipeline,
        reconcile.reconcile,
        registry.promote,
        registry.rollback,
    )
    for flow in (*flows, steps.train, steps.evaluate, study.study):
        for name, field in parameter_schema(flow).properties.items():
            assert field["title"] != name, f"{flow.name}: {name}"
            assert field["description"], f"{flow.name}: {name}"

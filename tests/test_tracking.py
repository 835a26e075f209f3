"""Journals in MLflow: complete, once, and never in the way of a training. Real SQLite stores, no mocks of MLflow."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import free_port, lock_of_up
from mlflow import MlflowClient
from mlflow.entities import Run

from gptcore.config import UserError
from gptcore.journal import Journal
from gptloom.tasks.records.forwarding import Forwarder, forward_tree
from gptloom.tasks.records.tracking import check_store, read_servers, tracking_uri

pytestmark = pytest.mark.integration  # a real MLflow store


def write_run(home: Path) -> Path:
    """A parent run and one nested run as journals of every kind of line."""
    directory = home / "runs" / "toy-1"
    parent = Journal(directory)
    parent.open("toy-1")
    parent.params({f"p{i}": i for i in range(150)} | {"long": "x" * 7000})
    parent.tags({"color": "red"})
    parent.dataset("texts", "0123456789abcdef", "my.txt", "training", {"documents": 3})
    (directory / "config.yaml").write_text("name: toy\n")
    parent.artifact("config.yaml")
    parent.artifact("gone.txt")
    child = Journal(directory / "train")
    child.open("toy-1/train", parent="toy-1", title="train")
    for step in range(300):
        child.metrics({"train/loss": 3.0 - step / 100, "train/lr": 0.1, "x": 1, "y": 2}, tokens_seen=10 * step, step=step)
    child.metrics({"val/bpb": 2.5}, tokens_seen=2990, step=299)
    (directory / "train" / "samples").mkdir()
    (directory / "train" / "samples" / "0.txt").write_text("to be")
    child.artifact("samples", folder="texts")
    child.close("FAILED", "disk on fire")
    parent.close()
    return directory


def find(uri: str, name: str) -> Run:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("toy")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], f"tags.`gptloom.run` = '{name}'")
    assert len(runs) == 1, f"{len(runs)} MLflow runs named {name}"
    return runs[0]


def everything(uri: str) -> str:
    """All that MLflow can tell about the experiment, as text."""
    client = MlflowClient(tracking_uri=uri)
    told = []
    for name in ("toy-1", "toy-1/train"):
        run = find(uri, name)
        history = [client.get_metric_history(run.info.run_id, key) for key in sorted(run.data.metrics)]
        told.append([run.to_dictionary(), [[(m.step, m.timestamp, m.value) for m in points] for points in history]])
    return json.dumps(told, default=str, sort_keys=True)


def test_every_kind_of_line_arrives(home: Path, mlflow_store: str) -> None:
    assert forward_tree(write_run(home), "toy", {"gptloom.host": "here"}) == []
    client = MlflowClient(tracking_uri=mlflow_store)
    parent, child = find(mlflow_store, "toy-1"), find(mlflow_store, "toy-1/train")
    assert len(parent.data.params) == 151  # in chunks of at most 100
    assert len(parent.data.params["long"]) == 6000
    assert parent.data.tags["color"] == "red"
    assert parent.data.tags["gptloom.host"] == "here"
    assert parent.info.status == "FINISHED"
    dataset = parent.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest, json.loads(dataset.profile)) == ("texts", "0123456789abcdef", {"documents": 3})
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["config.yaml"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (child.info.status, child.data.tags["gptloom.reason"]) == ("FAILED", "disk on fire")
    assert [file.path for file in client.list_artifacts(child.info.run_id, "texts")] == ["texts/0.txt"]
    points = client.get_metric_history(child.info.run_id, "train/loss")
    assert [point.step for point in points] == [10 * step for step in range(300)]  # the x-axis is tokens seen
    assert child.data.metrics["bpb"] == child.data.metrics["val/bpb"] == 2.5  # the compare page opens with its first metric
    assert "tokens seen" in client.get_experiment(parent.info.experiment_id).tags["mlflow.note.content"]
    assert (home / "mlartifacts" / "toy" / parent.info.run_id / "artifacts" / "config.yaml").is_file()


def test_replaying_changes_nothing(home: Path, mlflow_store: str) -> None:
    """A forwarder that died half-way starts from the first line again: no point may appear twice."""
    directory = write_run(home)
    client = MlflowClient(tracking_uri=mlflow_store)
    forward_tree(directory, "toy")
    before = everything(mlflow_store)
    forward_tree(directory, "toy")
    assert everything(mlflow_store) == before
    client.update_run(find(mlflow_store, "toy-1/train").info.run_id, status="RUNNING")  # as if its closing line were missing
    forward_tree(directory, "toy")
    assert everything(mlflow_store) == before


def test_resumed_run_shows_each_point_once(home: Path, mlflow_store: str) -> None:
    directory = home / "runs" / "toy-1"
    for attempt in range(2):
        journal = Journal(directory)
        journal.open("toy-1")
        for step in range(attempt * 2, 5):  # the second attempt repeats steps 2 to 4
            journal.metrics({"train/loss": float(step)}, tokens_seen=step)
        forward_tree(directory, "toy")
        assert find(mlflow_store, "toy-1").info.status == "RUNNING"
        journal.close(*(("KILLED", "stopped") if attempt == 0 else ("FINISHED", "")))
        forward_tree(directory, "toy")
    run = find(mlflow_store, "toy-1")
    assert run.info.status == "FINISHED"
    points = MlflowClient(tracking_uri=mlflow_store).get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in points] == [0, 1, 2, 3, 4]


def test_refused_line_does_not_block_the_rest(home: Path, mlflow_store: str, caplog: pytest.LogCaptureFixture) -> None:
    """MLflow never takes a second value for a parameter; the lines after it must still get through."""
    journal = Journal(home / "runs" / "toy-1")
    journal.open("toy-1")
    journal.params({"lr": 1})
    journal.params({"lr": 2})
    journal.metrics({"loss": 1.0}, tokens_seen=1)
    journal.close()
    assert forward_tree(home / "runs" / "toy-1", "toy") == []
    assert find(mlflow_store, "toy-1").data.metrics == {"loss": 1.0}
    assert "refuses a params line" in caplog.text


def test_outage_delays_records_and_loses_none(
    home: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = write_run(home)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    forwarder = Forwarder(directory, "toy")
    assert not forwarder.pump()
    assert not forwarder.pump()
    assert caplog.text.count("does not take records") == 1, "one warning, not one per second"
    assert len(forwarder.flush()) == 2
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert forwarder.flush() == []
    assert (
        len(MlflowClient(tracking_uri=mlflow_store).get_metric_history(find(mlflow_store, "toy-1/train").info.run_id, "x"))
        == 300
    )


def test_follow_forwards_while_work_goes_on(home: Path, mlflow_store: str) -> None:
    directory = home / "runs" / "toy-1"
    journal = Journal(directory)
    journal.open("toy-1")
    with Forwarder(directory, "toy").follow() as forwarder:
        journal.metrics({"loss": 1.0}, tokens_seen=1)
        deadline = time.monotonic() + 20
        while forwarder.run_id is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert forwarder.run_id, "nothing forwarded before the end"
        journal.close()
    assert find(mlflow_store, "toy-1").info.status == "FINISHED"


def test_store_that_does_not_answer_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    start = time.monotonic()
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        check_store()
    assert time.monotonic() - start < 15, "MLflow's own patience is four minutes"


def test_address_of_the_store(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's variable, else a server of `gptloom up` that is alive, else SQLite; a stale servers.json is no obstacle."""
    assert tracking_uri() == f"sqlite:///{home}/mlflow.db"
    home.mkdir()
    (home / "servers.json").write_text("not json")
    with lock_of_up(home):
        assert read_servers() == {}
    server = HTTPServer(("127.0.0.1", 0), _Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    (home / "servers.json").write_text(json.dumps({"mlflow_url": url}))
    assert tracking_uri() == f"sqlite:///{home}/mlflow.db", "nobody is up: a stranger may have the port by now"
    with lock_of_up(home):
        assert tracking_uri() == url
    server.shutdown()
    server.server_close()
    with lock_of_up(home):
        assert tracking_uri() == f"sqlite:///{home}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    assert tracking_uri() == "http://elsewhere:5000"


class _Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass

"""MLflow away, slow or hung while a training runs: the training does not notice, and nothing is missing afterwards.

.venv/bin/pytest tests/faults/test_outages.py               # the short form, with a stand-in for the training; part of make test
.venv/bin/pytest -s -m long tests/faults/test_outages.py    # 10 alternating pairs of a real training with MLflow 5 s away, and without
"""

from __future__ import annotations

import http.client
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import free_port
from mlflow import MlflowClient

from gptcore.config import dump_yaml, load_config
from gptcore.journal import Journal, read_journal
from gptcore.shards import prepare
from gptloom.tasks.records import forwarding, tracking
from gptloom.tasks.records.forwarding import Forwarder
from gptloom.tasks.records.runs import sync
from gptloom.tasks.runtime.process import run_device_process

pytestmark = [pytest.mark.integration, pytest.mark.timeout(290)]
ROOT = Path(__file__).resolve().parent.parent.parent
DELAY_S = 5.0


class MlflowServer:
    """A real MLflow server on its own database, that can be stopped and started."""

    def __init__(self, store: str, artifacts: Path) -> None:
        self.port, self.store, self.artifacts = free_port(), store, artifacts
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mlflow",
                "server",
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--workers",
                "1",
                "--backend-store-uri",
                self.store,
                "--artifacts-destination",
                str(self.artifacts),
            ],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 90
        while not tracking.answers(f"{self.url}/health"):
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(mlflow_store: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    server = MlflowServer(mlflow_store, home / "mlartifacts")
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield server
    server.kill()


class SlowProxy:
    """Stands before a server and hands every call on only after a while."""

    def __init__(self, target: int, delay_s: float) -> None:
        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                time.sleep(delay_s)
                upstream = http.client.HTTPConnection("127.0.0.1", target, timeout=60)
                upstream.request(self.command, self.path, body, {k: v for k, v in self.headers.items() if k != "Host"})
                reply = upstream.getresponse()
                data = reply.read()
                self.send_response(reply.status)
                self.send_header("Content-Type", reply.headers.get("Content-Type", "application/json"))
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_PATCH = answer

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def record_run(directory: Path, steps: range, *, is_end: bool) -> None:
    """What a pipeline run and a nested one of a later step write, here without computing anything."""
    parent, child = Journal(directory), Journal(directory / "train")
    if not parent.restarts:
        (directory / "config.yaml").write_text("name: toy\n")
        parent.open("toy-1")
        parent.params({"lr": 1})
        child.open("toy-1/train", "toy-1", "train")
    for step in steps:
        child.metrics({"train/loss": 3.0 - step / 1000, "train/lr": 0.1}, tokens_seen=step * 64, step=step)
    if is_end:
        samples = Journal(directory / "evaluate")
        samples.open("toy-1/evaluate", "toy-1", "evaluate")
        samples.params({"temperature": 0.8})
        (directory / "evaluate" / "samples.json").write_text("[]")
        samples.artifact("samples.json")
        for journal in (child, samples, parent):
            journal.close()


def everything(url: str) -> str:
    """All that MLflow can tell, as text."""
    client = MlflowClient(tracking_uri=url)
    told: list[object] = []
    for run in sorted(runs_in(client), key=lambda run: run.data.tags["gptloom.run"]):
        told.append([run.to_dictionary(), [file.path for file in client.list_artifacts(run.info.run_id)]])
        for key in sorted(run.data.metrics):
            points = client.get_metric_history(run.info.run_id, key)
            told.append([key, [(point.step, point.timestamp, point.value) for point in points]])
    return json.dumps(told, default=str, sort_keys=True)


def runs_in(client: MlflowClient) -> list:
    return list(client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]))


def test_stopped_from_the_first_point_until_after_the_run(home: Path, server: MlflowServer) -> None:
    """Points lost, doubled, or a nested run that never appears because its parent's server was away."""
    directory = home / "runs" / "toy-1"
    record_run(directory, range(1), is_end=False)
    forwarder = Forwarder(directory, "toy")
    assert forwarder.pump()
    server.kill()
    start = time.monotonic()
    with forwarder.follow():
        record_run(directory, range(1, 2000), is_end=True)
    assert time.monotonic() - start < forwarding.FLUSH_S + 10, "the run waited for MLflow"
    assert sync_without_a_server(forwarder)
    server.start()
    assert sync(["toy-1"]) == {"runs": ["toy-1"], "missing": []}
    once = everything(server.url)
    client = MlflowClient(tracking_uri=server.url)
    runs = {run.data.tags["gptloom.run"]: run for run in runs_in(client)}
    assert set(runs) == {"toy-1", "toy-1/train", "toy-1/evaluate"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    points = client.get_metric_history(runs["toy-1/train"].info.run_id, "train/loss")
    assert [point.step for point in points] == [64 * step for step in range(2000)]
    assert [f.path for f in client.list_artifacts(runs["toy-1/evaluate"].info.run_id)] == ["samples.json"]
    for _ in range(2):
        sync()
    for run in runs.values():  # as if MLflow had no end of them, so that every line is sent again
        client.update_run(run.info.run_id, status="RUNNING")
    sync()
    assert everything(server.url) == once


def sync_without_a_server(forwarder: Forwarder) -> bool:
    return len(forwarder.flush(2.0)) >= 1


def test_memory_holds_a_piece_of_a_long_journal(home: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage of a night must not fill the memory: what MLflow has not taken stays on the disk."""
    monkeypatch.setattr(forwarding, "QUEUE_BYTES", 2000)
    directory = home / "runs" / "toy-1"
    record_run(directory, range(1000), is_end=False)
    forwarder = Forwarder(directory, "toy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert not forwarder.pump()
    assert sum(len(copy.pending) for copy in forwarder._copies.values()) < 50
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert forwarder.flush() == []
    client = MlflowClient(tracking_uri=mlflow_store)
    (train,) = [run for run in runs_in(client) if run.data.tags["gptloom.run"] == "toy-1/train"]
    assert len(client.get_metric_history(train.info.run_id, "train/loss")) == 1000


def test_hung_server_delays_the_end_of_a_step_by_seconds_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts and never answers: MLflow's own patience is minutes for each call."""
    with socket.create_server(("127.0.0.1", 0)) as hung:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{hung.getsockname()[1]}")
        directory = home / "runs" / "toy-1"
        with Forwarder(directory, "toy").follow():
            record_run(directory, range(100), is_end=True)
            time.sleep(1.5)
            start = time.monotonic()
        assert time.monotonic() - start < forwarding.FLUSH_S + 10


# --- the long form ------------------------------------------------------------------------------------------------------

T_95 = {9: 1.833, 10: 1.812, 14: 1.761, 19: 1.729}  # Student's t, one-sided, by degrees of freedom
PAIRS = 10


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_step_time_with_slow_mlflow(
    home: Path, small_text: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call of MLflow takes 5 s: the upper 95 % bound of the step's extra time is below 1 %."""
    proxy = SlowProxy(server.port, DELAY_S)
    config = load_config(
        ROOT / "experiments" / "tiny.yaml",
        [f"data.source={small_text}", "train.max_steps=800", "train.eval_interval=800", "train.save_interval=800"],
    )
    shards = prepare(config, home).shards
    file = home / "tiny.yaml"
    file.write_text(dump_yaml(config))

    def step_ms(name: str, is_tracked: bool) -> float:
        out = home / "runs" / name
        arguments = ["gptcore.train", str(file), "--shards", str(shards), "--out", str(out), "--run", name]
        if is_tracked:
            run_device_process(arguments, out, experiment="toy")
        else:
            subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=True, capture_output=True)
        steps = [
            r["values"]["perf/step_ms"] for r in read_journal(out / "metrics.jsonl")[0] if "perf/step_ms" in r.get("values", {})
        ]
        return statistics.median(steps[5:])

    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    percent, cpu = [], []
    for pair in range(PAIRS):
        halves = {}
        for is_tracked in (True, False) if pair % 2 else (False, True):
            before = time.process_time()
            halves[is_tracked] = step_ms(f"run-{pair}-{is_tracked}", is_tracked)
            if is_tracked:
                cpu.append(time.process_time() - before)
        percent.append(100 * (halves[True] / halves[False] - 1))
    proxy.close()
    mean, spread = statistics.mean(percent), statistics.stdev(percent) / math.sqrt(PAIRS)
    bound = mean + T_95[max(df for df in T_95 if df <= PAIRS - 1)] * spread
    print(
        f"\nstep time with MLflow {DELAY_S:.0f} s away: {mean:+.2f} %, upper 95 % bound {bound:.2f} %, n={PAIRS} pairs, range "
        f"{min(percent):.2f} to {max(percent):.2f}; the watching process used {statistics.median(cpu):.2f} CPU seconds a run"
    )
    assert bound < 1.0

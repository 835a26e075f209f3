"""A real Prefect server, worker and MLflow server: cancels through the API, and each of them killed in the middle of a run.

.venv/bin/pytest -s -m long tests/faults/test_servers_die.py    # about 20 minutes on 2 cores; make test has one cancel, in test_servers.py
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_servers import ROOT, TINY, Stack, mlflow_runs, retried, running_stack, wait_for

from gptcore.checkpoint import list_checkpoints
from gptcore.entry import is_running
from gptcore.store import hash_file
from gptloom.flows.servers.prefect_api import answers, request

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(400),
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="counts processes in /proc (Linux)"),
]
GROUPS, CANCELS = 4, 5
STEPS = 6000  # half a minute of training


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("up")) as stack:
        yield stack


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, small_text: Path) -> Path:
    path = tmp_path_factory.mktemp("experiments") / "tiny.yaml"
    train = {**TINY["train"], "log_interval": 20, "save_interval": 50, "precision": "fp32", "device": "cpu"}
    path.write_text(json.dumps({**TINY, "train": train, "data": {"source": str(small_text)}}))
    return path


def start_training(stack: Stack, tiny: Path, steps: int) -> dict[str, Any]:
    """A flow run of the worker's, once it has saved a checkpoint; as Prefect describes it."""
    run = stack.start_run("pipeline/smoke", {"experiment": str(tiny), "overrides": {"max_steps": steps}})
    stack.wait_for_run(run, {"RUNNING"}, 90)
    found = retried(lambda: request(f"{stack.api}/flow_runs/{run}"))
    folder = stack.home / "runs" / found["name"] / "train" / "checkpoints"
    assert wait_for(lambda: bool(list_checkpoints(folder)), 90), stack.worker_log()
    return found


def processes_of(stack: Stack, name: str) -> dict[str, int]:
    """The flow-run process (`engine`) and the training (`train`) of a run."""
    found = stack.processes()
    train = [pid for pid, command in found.items() if f"--run {name}/train" in command]
    assert len(train) == 1, found
    above = psutil.Process(train[0]).parents()  # the fork server, if there is one, and the flow run
    engine = next(process for process in above if "gptcore.forkserver" not in process.cmdline())
    return {"train": train[0], "engine": engine.pid}


def statuses(stack: Stack, name: str) -> dict[str, str]:
    """Of a pipeline run and its nested runs in MLflow."""
    runs = {run.data.tags["gptloom.run"]: run.info.status for run in mlflow_runs(stack, "tiny")}
    return {run: status for run, status in runs.items() if run.partition("/")[0] == name}


@pytest.mark.parametrize("group", range(GROUPS))
def test_cancels(stack: Stack, tiny: Path, group: int, record_property: Any) -> None:
    """A cancel that leaves the training process holds the device; one that leaves a run RUNNING misleads everyone."""
    rng, seconds = random.Random(group), []
    for _ in range(CANCELS):
        before = set(stack.processes())
        run = start_training(stack, tiny, 10_000_000)
        time.sleep(rng.uniform(0.0, 3.0))
        start = time.monotonic()
        body = {"state": {"type": "CANCELLING", "message": "by hand"}}
        retried(lambda run=run, body=body: request(f"{stack.api}/flow_runs/{run['id']}/set_state", body))
        assert wait_for(lambda before=before: not set(stack.processes()) - before, 30), stack.processes()
        seconds.append(round(time.monotonic() - start, 1))
        stack.wait_for_run(run["id"], {"CANCELLED"}, 30)
        name = run["name"]
        assert statuses(stack, name) == {name: "KILLED", f"{name}/train": "KILLED"}
        assert list_checkpoints(stack.home / "runs" / name / "train" / "checkpoints")
    print(f"\n{CANCELS} cancels: seconds until no process of the run was left {seconds}, median {statistics.median(seconds)}")


def test_prefect_server_killed(stack: Stack, tiny: Path) -> None:
    """The run goes on without it, and its states are right once it is back."""
    run = start_training(stack, tiny, STEPS)
    os.kill(json.loads(stack.state.read_text())["pids"]["prefect"], signal.SIGKILL)
    assert wait_for(lambda: not answers(f"{stack.api}/health"), 10)
    assert wait_for(lambda: answers(f"{stack.api}/health"), 60), (stack.home / "up.txt").read_text()
    stack.wait_for_run(run["id"], {"COMPLETED"}, 200)
    assert set(statuses(stack, run["name"]).values()) == {"FINISHED"}


def test_worker_killed_alone(stack: Stack, tiny: Path) -> None:
    """Another worker is started; the run does not need it."""
    run = start_training(stack, tiny, STEPS)
    os.kill(json.loads(stack.state.read_text())["pids"]["worker-cpu"], signal.SIGKILL)
    stack.wait_for_run(run["id"], {"COMPLETED"}, 200)
    assert set(statuses(stack, run["name"]).values()) == {"FINISHED"}


def test_worker_and_flow_run_killed_and_resumed(stack: Stack, tiny: Path) -> None:
    """As in a power cut: the training dies with its parent, and the resumed run ends with the weights of one never interrupted."""
    whole = start_training(stack, tiny, STEPS)
    stack.wait_for_run(whole["id"], {"COMPLETED"}, 200)
    run = start_training(stack, tiny, STEPS)
    name = run["name"]
    pids = processes_of(stack, name)
    for pid in (json.loads(stack.state.read_text())["pids"]["worker-cpu"], pids["engine"]):
        os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: not is_running(pids["train"]), 5), "the training outlived its flow run"
    done = subprocess.run(
        [*stack.command("run"), "--resume", name], cwd=ROOT, env=stack.env, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    resumed = Path(json.loads(done.stdout.splitlines()[-1])["checkpoint"])
    other = stack.home / "runs" / whole["name"] / "train" / "checkpoints" / resumed.name
    assert hash_file(resumed / "model.safetensors") == hash_file(other / "model.safetensors")
    assert set(statuses(stack, name).values()) == {"FINISHED"}
    train = next(r for r in mlflow_runs(stack, "tiny") if r.data.tags["gptloom.run"] == f"{name}/train")
    assert train.data.tags["gptloom.resumes"] == "1"

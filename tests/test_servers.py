"""One real `gptloom up` from start to end: what it registers, what a worker runs, and that nothing stays behind.

.venv/bin/pytest tests/test_servers.py        # about three minutes; the tests build on each other, in this order
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port, log_in, require
from test_logins import Browser

from gptloom.flows.servers.prefect_api import answers, request
from gptloom.tasks.records.tracking import mlflow_database

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="counts processes in /proc (Linux)"),
]
TINY = {
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32},
    "train": {"max_steps": 30, "global_batch_size": 8, "warmup_steps": 2, "eval_tokens": 512, "seed": 7},
    "evaluate": {"samples": 1, "sample_tokens": 20, "bootstrap": 0},
    "studies": {"floor": False, "timing": False, "quantization": False, "accumulation": False, "rnn": False},
}


@dataclass
class Stack:
    """A `gptloom up` and where it listens."""

    home: Path
    prefect_port: int
    mlflow_port: int
    folder: Path = ROOT
    program: tuple[str, ...] = (sys.executable, "-m", "gptloom.flows.command.cli")
    process: subprocess.Popen[str] | None = None

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.prefect_port}/api"

    @property
    def mlflow_url(self) -> str:
        return f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def state(self) -> Path:
        return self.home / "servers.json"

    def start(self) -> None:
        """Start it, unless it runs, and wait until it says that all is healthy."""
        if self.process is not None and self.process.poll() is None:
            return
        output = open(self.home / "up.txt", "w")  # noqa: SIM115 (closed with the child's copy)
        self.process = subprocess.Popen(self.command("up"), cwd=self.folder, env=self.env, stdout=output, stderr=output)
        output.close()
        if not wait_for(lambda: self.state.exists() or self.process.poll() is not None, 240) or not self.state.exists():
            pytest.fail(f"gptloom up did not come up:\n{(self.home / 'up.txt').read_text()}")
        log_in(self.home)

    def command(self, verb: str) -> list[str]:
        ports = ["--prefect-port", str(self.prefect_port), "--mlflow-port", str(self.mlflow_port)]
        return [*self.program, verb, *(ports if verb == "up" else [])]

    @property
    def env(self) -> dict[str, str]:
        # A worker asks for work every second, not every ten: a test starts a dozen runs, one after the other.
        return {**os.environ, "GPTLOOM_HOME": str(self.home), "PREFECT_WORKER_QUERY_SECONDS": "1"}

    def call(self, verb: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(verb), cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=150)

    def deployment(self, name: str) -> dict[str, Any]:
        return request(f"{self.api}/deployments/name/{name}")

    def start_run(self, deployment: str, parameters: dict[str, Any]) -> str:
        """A flow run as the UI makes it; returns its id. The key lets a 503 (SQLite is busy) be tried again."""
        url = f"{self.api}/deployments/{self.deployment(deployment)['id']}/create_flow_run"
        key = f"{deployment}-{time.monotonic_ns()}"
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}, "idempotency_key": key}
        return retried(lambda: request(url, body))["id"]

    def wait_for_run(self, run: str, states: set[str], seconds: float) -> dict[str, Any]:
        """The flow run once it is in one of these states, or in any final one."""
        final = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
        found: dict[str, Any] = {}

        def arrived() -> bool:
            found.update(retried(lambda: request(f"{self.api}/flow_runs/{run}")))
            return found["state_type"] in states | final

        assert wait_for(arrived, seconds), f"still {found['state_type']} after {seconds} s\n{self.worker_log()}"
        assert found["state_type"] in states, f"{found['state']}\n{self.worker_log()}"
        return found

    def worker_log(self) -> str:
        return "\n".join((self.home / "servers" / "worker-cpu.log").read_text().splitlines()[-40:])

    def processes(self) -> dict[int, str]:
        """Whatever runs with this home in its environment: id and command."""
        entry = f"GPTLOOM_HOME={self.home}".encode()
        found = {}
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                if int(directory.name) != os.getpid() and entry in (directory / "environ").read_bytes().split(b"\0"):
                    found[int(directory.name)] = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.3)
    return True


def retried(call: Callable[[], Any]) -> Any:
    for _ in range(5):
        try:
            return call()
        except OSError:
            time.sleep(1)
    return call()


@contextmanager
def running_stack(home: Path, **where: Any) -> Iterator[Stack]:
    """A `gptloom up` on ports of its own, ended afterwards with all that it started."""
    stack = Stack(home, free_port(), free_port(), **where)
    try:
        stack.start()
        yield stack
    finally:
        if stack.process is not None and stack.process.poll() is None:
            stack.process.terminate()
            stack.process.wait(120)
        os.environ.pop("PREFECT_API_AUTH_STRING", None)
        for pid in stack.processes():  # only after a test that failed for it
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """In a home whose name means something else in an address."""
    home = tmp_path_factory.mktemp("up") / "a home?x=%41#1"
    home.mkdir(mode=0o700)
    with running_stack(home) as stack:
        yield stack


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, small_text: Path) -> Path:
    """An experiment of seconds on the small text."""
    path = tmp_path_factory.mktemp("experiments") / "tiny.yaml"
    path.write_text(json.dumps({**TINY, "data": {"source": str(small_text)}}))  # JSON is YAML
    return path


def test_up_tells_where_it_listens_once_it_is_healthy(stack):
    """servers.json written too early sends `gptloom run` to servers that refuse it."""
    state = json.loads(stack.state.read_text())
    assert state["prefect_api_url"] == stack.api
    assert state["mlflow_url"] == stack.mlflow_url
    assert state["pid"] == stack.process.pid
    assert answers(f"{stack.api}/health")
    assert answers(f"{stack.mlflow_url}/health")
    said = (stack.home / "up.txt").read_text()
    assert f"http://127.0.0.1:{stack.prefect_port}" in said
    assert stack.mlflow_url in said
    # One process more per server would be MLflow's eight job runners (2 GB) again.
    servers = [command for command in stack.processes().values() if "prefect.engine" not in command]
    assert len(servers) <= 7, servers


def test_schedules_fire(stack):
    """With two known package sets everything starts and the nightly run is never scheduled, or no deployment is made."""
    scheduled = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}

    def runs() -> list[dict[str, Any]]:
        return retried(lambda: request(f"{stack.api}/flow_runs/filter", scheduled))

    assert wait_for(lambda: bool(runs()), 60), (stack.home / "servers" / "prefect.log").read_text()[-3000:]
    nightly, reconcile = stack.deployment("nightly/nightly")["id"], stack.deployment("reconcile/reconcile")["id"]
    assert wait_for(lambda: {nightly, reconcile} <= {run["deployment_id"] for run in runs()}, 60)
    assert all(run["auto_scheduled"] for run in runs())
    nights = [run for run in runs() if run["deployment_id"] == nightly]
    assert all("T02:00:00" in run["expected_start_time"] for run in nights)  # UTC in prefect.yaml


def test_deployments_are_registered(stack):
    for name in ("pipeline/shakespeare", "pipeline/smoke", "nightly/nightly"):
        assert stack.deployment(name)["work_pool_name"] == "cpu"
    assert stack.deployment("pipeline/shakespeare-gpu")["work_pool_name"] == "gpu"
    assert stack.deployment("nightly/nightly")["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"


def test_port_in_use_is_the_users_to_mend(stack, tmp_path):
    """A traceback, or half the servers left running, when another program has the port."""
    other = Stack(tmp_path, stack.prefect_port, free_port())
    result = other.call("up")
    assert result.returncode == 2
    assert f"port {stack.prefect_port}" in result.stderr
    assert "gptloom down" in result.stderr
    assert "--prefect-port" in result.stderr
    assert "Traceback" not in result.stderr
    assert not other.processes()


def test_second_up_for_one_home_is_refused(stack):
    """Two `up`s on one database and one servers.json: `down` would stop only one of them."""
    second = Stack(stack.home, free_port(), free_port()).call("up")
    assert second.returncode == 2
    assert str(stack.process.pid) in second.stderr
    assert stack.state.exists()


def test_another_checkout_is_refused(stack, tmp_path):
    """Its flows would run with this one's library, or the other way round, without a word."""
    for file in ("prefect.yaml", "experiments/smoke.yaml", "gptloom/__init__.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / file, tmp_path / file)
    installed = (sys.executable, "-P", "-m", "gptloom.flows.command.cli")
    result = Stack(tmp_path / "home", free_port(), free_port(), tmp_path, installed).call("up")
    assert result.returncode == 2
    assert str(tmp_path) in result.stderr
    assert str(ROOT) in result.stderr


def test_other_hosts_need_a_login(stack, tmp_path):
    """Prefect runs code for whoever reaches it."""
    other = Stack(tmp_path, free_port(), free_port())
    command = [*other.command("up"), "--host", "0.0.0.0", "--no-auth"]
    result = subprocess.run(command, cwd=ROOT, env=other.env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "everyone who reaches it could run code here" in result.stderr


def test_run_form_describes_its_fields(stack, tmp_path):
    """The form is made from the flow's types; a change there can silently leave a bare JSON box."""
    with Browser(tmp_path / "profile") as browser:
        browser.go(
            f"http://127.0.0.1:{stack.prefect_port}/deployments/deployment/{stack.deployment('pipeline/smoke')['id']}/run"
        )
        wait_for(lambda: browser.js("!!document.querySelector('input')"), 60)
        browser.type((stack.home / "login").read_text().strip())
        browser.wait("Length (optimizer steps)")
        form = browser.text()
    for words in (
        "Length (optimizer steps)",
        "Depth (layers)",
        "Path of an experiment file",
        "a folder (all its files of data.formats",
    ):
        assert words in form


def test_wrong_value_is_refused_by_the_form(stack):
    """A value outside its bounds must be refused before a worker starts anything."""
    url = f"{stack.api}/deployments/{stack.deployment('pipeline/smoke')['id']}/create_flow_run"
    with pytest.raises(OSError, match="HTTP Error 4"):
        request(url, {"parameters": {"overrides": {"max_steps": -1}}, "state": {"type": "SCHEDULED"}})


def test_run_from_the_ui_completes(stack, small_text):
    """The way from the form through the worker to MLflow: working directory, environment, parameters, tracking."""
    run = stack.start_run("pipeline/smoke", {"overrides": {"data_source": str(small_text)}})
    ended = stack.wait_for_run(run, {"COMPLETED"}, 180)
    found = mlflow_runs(stack, "smoke")
    parent = next(entry for entry in found if entry.data.tags["gptloom.run"] == ended["name"])
    assert parent.data.tags["prefect.flow_run_id"] == run
    nested = [entry for entry in found if entry.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(nested) >= 5
    assert {entry.info.status for entry in found} == {"FINISHED"}


def test_nightly_runs_once_for_one_text(stack, tiny):
    """A nightly run that always skips never retrains; one that never skips burns a night for nothing."""
    parameters = {"experiment": str(tiny)}
    first = stack.wait_for_run(stack.start_run("nightly/nightly", parameters), {"COMPLETED"}, 180)
    assert first["state_name"] == "Promoted", first["state"]
    second = stack.wait_for_run(stack.start_run("nightly/nightly", parameters), {"COMPLETED"}, 120)
    assert second["state_name"] == "Skipped"
    assert "no new text in corpus" in second["state"]["message"]
    nights = json.loads((stack.home / "nightly" / "tiny" / "ledger.json").read_text())["nights"]
    assert [night["run"] for night in nights] == [first["name"], second["name"]]
    assert (stack.home / "runs" / first["name"]).is_dir()


def test_trainings_of_one_pool_wait_for_each_other_and_the_urgent_do_not(stack, tiny):
    """Two trainings side by side halve each other's speed and may not fit the device; a rollback must not wait for either."""
    slow = {"experiment": str(tiny), "overrides": {"max_steps": 200}}
    runs = [stack.start_run("train/train", slow), stack.start_run("train/train", slow)]
    stack.wait_for_run(runs[0], {"RUNNING"}, 120)
    promoted = stack.wait_for_run(stack.start_run("promote/promote", {"model": "tiny"}), {"COMPLETED"}, 120)
    one, two = (stack.wait_for_run(run, {"COMPLETED"}, 120) for run in runs)
    first, second = sorted((one, two), key=lambda run: run["start_time"])
    assert first["end_time"] <= second["start_time"]
    assert promoted["end_time"] < second["end_time"]


def test_night_that_fires_while_the_last_still_runs_is_cancelled(stack, tiny):
    """Two nights at once would both replace one champion."""
    long = {"experiment": str(tiny), "overrides": {"max_steps": 10_000_000, "more": ["name=long-night"]}, "force": True}
    first = stack.start_run("nightly/nightly", long)
    stack.wait_for_run(first, {"RUNNING"}, 120)
    second = stack.wait_for_run(stack.start_run("nightly/nightly", long), {"CANCELLED"}, 120)
    assert "concurrency limit" in second["state"]["message"].lower()
    retried(lambda: request(f"{stack.api}/flow_runs/{first}/set_state", {"state": {"type": "CANCELLING"}}))
    stack.wait_for_run(first, {"CANCELLED"}, 120)


def test_pool_without_a_worker_says_so(stack):
    """A run that waits for ever in silence; here the GPU's pool, where there is no GPU."""
    pool = request(f"{stack.api}/work_pools/gpu")
    if pool["status"] == "READY":
        pytest.skip("there is a GPU here")
    assert pool["description"].startswith("No worker")
    assert "pool gpu: no worker" in (stack.home / "up.txt").read_text()
    queues = {queue["name"]: queue for queue in request(f"{stack.api}/work_pools/gpu/queues/filter", {})}
    assert queues["urgent"]["priority"] < queues["default"]["priority"]
    assert queues["default"]["concurrency_limit"] == 1


def start_long_run(stack: Stack, tiny: Path) -> str:
    """A flow run that would train for hours, once it trains."""
    run = stack.start_run("pipeline/smoke", {"experiment": str(tiny), "overrides": {"max_steps": 10_000_000}})
    stack.wait_for_run(run, {"RUNNING"}, 120)
    name = request(f"{stack.api}/flow_runs/{run}")["name"]
    journal = stack.home / "runs" / name / "train" / "metrics.jsonl"
    assert wait_for(lambda: journal.exists() and "train/loss" in journal.read_text(), 120), stack.worker_log()
    return run


def test_power_cut_of_a_run_is_put_right_and_resumed(stack, tiny):
    """Killed with its worker, a run stays RUNNING in both systems for ever, holds its slot, and its hours are lost."""
    steps = {"max_steps": 1000, "more": ["train.save_interval=100"]}
    parameters = {"experiment": str(tiny), "overrides": steps}
    whole = stack.wait_for_run(stack.start_run("pipeline/smoke", parameters), {"COMPLETED"}, 120)
    run = stack.start_run("pipeline/smoke", parameters)
    assert wait_for(lambda: bool(checkpoints(stack, run)), 120), stack.worker_log()
    name = request(f"{stack.api}/flow_runs/{run}")["name"]
    worker = json.loads(stack.state.read_text())["pids"]["worker-cpu"]
    flow_run = [pid for pid, command in stack.processes().items() if "prefect.engine" in command or "flow-run" in command]
    os.kill(worker, signal.SIGKILL)
    for pid in flow_run:
        os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: not training_processes(stack), 30), stack.processes()
    assert wait_for(lambda: json.loads(stack.state.read_text())["pids"]["worker-cpu"] != worker, 20), "no worker again"
    assert request(f"{stack.api}/flow_runs/{run}")["state_type"] == "RUNNING"  # nobody knows yet

    code = "from datetime import timedelta; import gptloom.flows.reconcile as r; r.SETTLE = timedelta(0); r.reconcile(apply=True, resume=True)"
    env = stack.env | {"PREFECT_API_URL": stack.api, "MLFLOW_TRACKING_URI": stack.mlflow_url}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True, timeout=90, capture_output=True)
    found = [entry for entry in mlflow_runs(stack, "tiny") if entry.data.tags["gptloom.run"].startswith(name)]
    assert [entry.info.status for entry in found] == ["FAILED", "FAILED"]  # the pipeline's run and its training
    states = request(f"{stack.api}/flow_run_states/?flow_run_id={run}")
    crashed = [state["message"] for state in states if state["type"] == "CRASHED"]
    assert len(crashed) == 1, states
    assert "its process is gone" in crashed[0]

    done = stack.wait_for_run(run, {"COMPLETED"}, 120)
    assert done["name"] == name, "a resumed run keeps its name"
    assert re.search(r"resumed at step [1-9]\d*00 ", (stack.home / "runs" / name / "train" / "log.txt").read_text())
    assert weights(stack, name) == weights(stack, whole["name"])


def checkpoints(stack: Stack, run: str) -> list[Path]:
    name = request(f"{stack.api}/flow_runs/{run}")["name"]
    return list((stack.home / "runs" / name / "train" / "checkpoints").glob("step_*/COMMITTED"))


def training_processes(stack: Stack) -> list[str]:
    return [command for command in stack.processes().values() if "gptcore.train" in command]


def weights(stack: Stack, name: str) -> str:
    (newest,) = (stack.home / "runs" / name / "train" / "checkpoints").glob("step_001000")
    return hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()


def test_cancel_in_the_ui_ends_every_process_of_the_run(stack, tiny):
    """The long form, 20 of them, is in tests/faults."""
    before = set(stack.processes())
    run = start_long_run(stack, tiny)
    request(f"{stack.api}/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    assert wait_for(lambda: not set(stack.processes()) - before, 30), stack.processes()
    name = stack.wait_for_run(run, {"CANCELLED"}, 30)["name"]
    found = {entry.data.tags["gptloom.run"]: entry for entry in mlflow_runs(stack, "tiny")}
    assert {found[key].info.status for key in (name, f"{name}/train")} == {"KILLED"}
    assert (stack.home / "runs" / name / "train" / "checkpoints").is_dir()


def test_down_cancels_and_stops_everything(stack, tiny):
    """An orphaned worker, flow run or MLflow child keeps port, memory and GPU; a run must not stay RUNNING in MLflow."""
    start_long_run(stack, tiny)
    result = stack.call("down")
    assert result.returncode == 0, result.stderr
    assert stack.process.wait(10) == 0, (stack.home / "up.txt").read_text()
    assert not stack.processes()
    assert not stack.state.exists()
    statuses = [entry.info.status for entry in mlflow_runs(stack, "tiny")]
    assert statuses.count("KILLED") == 4, statuses  # the pipeline's run and its training, here and of the cancel before
    assert "RUNNING" not in statuses
    assert stack.call("down").returncode == 0  # nothing to stop is no mistake


def test_dead_server_is_started_again_and_a_dying_one_ends_the_rest(stack):
    """Half a stack looks alive and loses every record; whoever restarts it needs to know what died, and why."""
    stack.start()  # also: a second start on the databases of the first

    def pid() -> int | None:
        try:
            return json.loads(stack.state.read_text())["pids"]["mlflow"]
        except FileNotFoundError:  # it has given up
            return None

    def kill_mlflow() -> None:
        before = pid()
        assert before is not None, "it has given up too early"
        os.kill(before, signal.SIGKILL)
        assert wait_for(lambda: pid() != before, 60)

    kill_mlflow()
    assert wait_for(lambda: answers(f"{stack.mlflow_url}/health"), 60), (stack.home / "up.txt").read_text()
    assert len(stack.processes()) <= 7, stack.processes()
    for _ in range(3):
        kill_mlflow()
    assert stack.process.wait(60) == 1
    said = (stack.home / "up.txt").read_text()
    assert "mlflow ended by itself" in said
    assert str(stack.home / "servers" / "mlflow.log") in said
    assert "Traceback" not in said
    assert not stack.processes()
    assert not stack.state.exists()


def test_ctrl_c_while_starting_leaves_nothing(stack):
    """The first seconds of `up` have children too, and no servers.json to find them by."""
    early = Stack(stack.home, stack.prefect_port, stack.mlflow_port)
    early.process = subprocess.Popen(early.command("up"), cwd=ROOT, env=early.env, stderr=subprocess.DEVNULL)
    assert wait_for(lambda: any("mlflow server" in command for command in early.processes().values()), 30)
    early.process.send_signal(signal.SIGINT)
    assert early.process.wait(60) == 0
    assert not early.processes()


def test_killed_up_leaves_nothing(stack, tiny):
    """Without a last word from `up`: the servers' own children and a flow run in its own session must go too."""
    stack.start()
    start_long_run(stack, tiny)
    stack.process.send_signal(signal.SIGKILL)
    stack.process.wait()
    assert wait_for(lambda: not stack.processes(), 20), stack.processes()


def mlflow_runs(stack: Stack, experiment: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=mlflow_database(stack.home))
    found = client.get_experiment_by_name(experiment)
    assert found is not None, f"MLflow has no experiment {experiment}"
    return list(client.search_runs([found.experiment_id]))


UNHEARD = """
import sys
import flows
from rich.console import Console
console = Console(file=sys.stderr)
console.print("heard")
sys.stdin.readline()
for _ in range(3):
    console.print("unheard")
print("unheard", flush=True)
open(sys.argv[1], "w").close()
"""


def test_a_flow_run_outlives_the_reader_of_its_output(tmp_path):
    """A worker that is killed took its flow runs with it: rich, with which Prefect logs, raises SystemExit at a broken pipe."""
    command = [sys.executable, "-c", UNHEARD, str(tmp_path / "done")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PREFECT__FLOW_RUN_ID": "1"}, **pipes) as process:
        assert process.stdout.readline() == b"heard\n"
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.wait(30) == 0
    assert (tmp_path / "done").exists()


# --- PostgreSQL ------------------------------------------------------------------------------------------------------


@pytest.fixture
def postgres_uri() -> Iterator[str]:
    """A PostgreSQL server of our own on a free port, as another user when we are root (it refuses to run as root)."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    search = os.pathsep.join([str(installed[-1])] if installed else []) or None
    initdb = shutil.which("initdb", path=search) or require("initdb", "MLflow on PostgreSQL")
    control = str(Path(initdb).with_name("pg_ctl"))
    # Not one of pytest's folders: each session that starts closes those to other users, also under a running server.
    directory, port = Path(tempfile.mkdtemp(prefix="gptloom-postgres-")), free_port()
    as_user: list[str] = []
    if os.geteuid() == 0:
        as_user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(directory, "postgres")
    data = str(directory / "data")
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={directory} -c fsync=off"
    make = [initdb, "-D", data, "-U", "gptloom", "--auth=trust", "-E", "UTF8"]
    start = [control, "-D", data, "-w", "-l", str(directory / "log"), "-o", settings, "start"]
    stop = [control, "-D", data, "-m", "immediate", "-w", "stop"]
    try:
        subprocess.run([*as_user, *make], check=True, capture_output=True, cwd="/")
        subprocess.run([*as_user, *start], check=True, stdout=subprocess.DEVNULL, cwd="/")
        yield f"postgresql+psycopg2://gptloom@127.0.0.1:{port}/postgres"
        subprocess.run([*as_user, *stop], check=True, stdout=subprocess.DEVNULL, cwd="/")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def test_journal_goes_to_postgresql(postgres_uri, home, monkeypatch):
    """docker-compose.yml keeps MLflow in PostgreSQL, which is stricter than SQLite about types, lengths and duplicates."""
    from mlflow import MlflowClient

    from gptcore.journal import Journal
    from gptloom.tasks.records.forwarding import forward_tree

    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgres_uri)
    directory = home / "runs" / "night-1"
    journal = Journal(directory)
    journal.open("night-1")
    journal.params({"train.lr": 0.01, "evaluate.prompt": "“Ärger” 🎭", "data.source": "x" * 5000})
    journal.dataset("words", "0123456789abcdef", "words.txt", "training", {"documents": 3})
    for step in range(50):
        journal.metrics({"train/loss": 4.0 - step / 100, "perf/tok_per_sec": 1e6}, step=step, tokens_seen=step * 1024)
    (directory / "config.yaml").write_text("name: night\n")
    journal.artifact("config.yaml")
    journal.close()
    assert forward_tree(directory, "night") == []
    assert forward_tree(directory, "night") == []  # again: nothing may be doubled

    client = MlflowClient(tracking_uri=postgres_uri)
    experiment = client.get_experiment_by_name("night")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["evaluate.prompt"] == "“Ärger” 🎭"
    points = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in points] == [step * 1024 for step in range(50)]
    assert points[-1].value == pytest.approx(3.51)
    assert run.inputs.dataset_inputs[0].dataset.digest == "0123456789abcdef"
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["config.yaml"]

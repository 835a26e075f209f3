"""The reconciler's judgement, case by case: who is dead, what each system is then told, and what is left alone.

Real journals, real processes and a real MLflow store; of Prefect's server only what is asked of it. A power cut under a real
server and worker is in test_servers.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import psutil
import pytest
from mlflow import MlflowClient
from prefect.client.schemas.objects import FlowRun, State, StateType

from gptcore.config import UserError
from gptcore.journal import FILE_NAME, Journal, last_record
from gptcore.locks import is_held
from gptloom.flows.reconcile import GONE, MARK, OWN_FLOWS, Reconciler
from gptloom.tasks.records.forwarding import Forwarder
from gptloom.tasks.runtime.liveness import ProcessSnapshot, end_processes, unfinished_runs

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("mlflow_store")]  # a real store, real processes


class Server:
    """What the reconciler asks of Prefect, answered from lists."""

    def __init__(self) -> None:
        self.flow_runs: list[FlowRun] = []
        self.heartbeats: set[str] = set()
        self.entrypoint = "flows/pipeline.py:pipeline"
        self.told: list[tuple[str, str]] = []  # name of the flow run, its new state

    def add(
        self, name: str, state: StateType, *, ago: timedelta = timedelta(minutes=5), message: str = "", **more: Any
    ) -> FlowRun:
        known = {"flow_id": uuid4(), "deployment_id": uuid4(), "run_count": 1} | more
        run = FlowRun(name=name, state=State(type=state, timestamp=datetime.now(UTC) - ago, message=message), **known)
        self.flow_runs.append(run)
        return run

    def read_flow_runs(self, *, flow_run_filter: Any, limit: int = 200, offset: int = 0) -> list[FlowRun]:
        wanted = flow_run_filter
        found = [
            run
            for run in self.flow_runs
            if (wanted.state is None or (run.state and run.state.type in wanted.state.type.any_))
            and (wanted.name is None or run.name in wanted.name.any_)
            and (wanted.id is None or run.id in wanted.id.any_)
        ]
        return found[offset : offset + limit]

    def set_flow_run_state(self, flow_run_id: Any, state: State[Any]) -> Any:
        (run,) = (run for run in self.flow_runs if run.id == flow_run_id)
        run.state = state
        self.told.append((run.name, state.name or ""))
        return SimpleNamespace(state=state)

    def read_task_runs(self, **_: Any) -> list[Any]:
        return []

    def read_events(self, *, filter: Any, limit: int) -> Any:
        return SimpleNamespace(total=sum(name in self.heartbeats for name in filter.resource.id))

    def read_flow(self, _flow_id: Any) -> Any:
        return SimpleNamespace(name="someone-elses")

    def read_deployment(self, _deployment_id: Any) -> Any:
        return SimpleNamespace(entrypoint=self.entrypoint)

    def read_task_run(self, task_run_id: Any) -> Any:
        (parent,) = (run for run in self.flow_runs if task_run_id in run.labels.values())
        return SimpleNamespace(flow_run_id=parent.id)


@pytest.fixture
def server() -> Server:
    return Server()


def cycle(server: Server, home: Path, *, apply: bool = True, resume: bool = False) -> list[tuple[str, str, str]]:
    """One run of the reconciler: what, of what, and how it went."""
    findings = Reconciler(server, home, apply, resume).run()  # type: ignore[arg-type]
    return [(finding.what, finding.subject, finding.outcome) for finding in findings]


def begin(home: Path, name: str, *, forward: bool = True) -> tuple[Journal, Journal]:
    """A pipeline's journal and its training's, both under way and known to MLflow."""
    parent, child = Journal(home / "runs" / name), Journal(home / "runs" / name / "train")
    parent.open(name)
    child.open(f"{name}/train", name)
    child.metrics({"train/loss": 2.0}, tokens_seen=8, step=1)
    if forward:
        assert Forwarder(home / "runs" / name, "toy").pump()
    return parent, child


def kill(*journals: Journal, pid: int = 2**22 + 1) -> None:
    """What the kernel does at a SIGKILL: the locks fall. (Our own process id in the journal would say that we live.)"""
    for journal in journals:
        os.close(journal._fd)
        journal._fd = -1
        as_of(pid, journal.path)


def as_of(pid: int, path: Path) -> None:
    """A journal of ours as another process would have written it; an older version's, which knew no checksums."""
    text = re.sub(r', "crc": "[0-9a-f]{8}"', "", path.read_text())
    path.write_text(text.replace(f'"pid": {os.getpid()}', f'"pid": {pid}'))


def in_mlflow() -> dict[str, str]:
    client = MlflowClient(tracking_uri=f"sqlite:///{os.environ['GPTLOOM_HOME']}/mlflow.db")
    experiment = client.get_experiment_by_name("toy")
    assert experiment is not None
    return {run.data.tags["gptloom.run"]: run.info.status for run in client.search_runs([experiment.experiment_id])}


def test_a_dead_run_is_put_right_in_both_systems(home: Path, server: Server) -> None:
    kill(*begin(home, "toy-1"))
    server.add("toy-1", StateType.RUNNING)
    assert cycle(server, home) == [("journal", "toy-1", "done"), ("prefect", "toy-1", "done")]
    assert server.told == [("toy-1", "Crashed")]
    assert in_mlflow() == {"toy-1": "FAILED", "toy-1/train": "FAILED"}
    assert cycle(server, home) == [], "once is enough"


def test_a_dry_run_changes_nothing(home: Path, server: Server) -> None:
    kill(*begin(home, "toy-1"))
    server.add("toy-1", StateType.RUNNING)
    before = {path: path.read_bytes() for path in home.rglob("*.jsonl")}
    found = cycle(server, home, apply=False, resume=True)
    assert found == [("journal", "toy-1", "proposed"), ("prefect", "toy-1", "proposed"), ("resume", "toy-1", "proposed")]
    assert server.told == []
    assert {path: path.read_bytes() for path in home.rglob("*.jsonl")} == before
    assert set(in_mlflow().values()) == {"RUNNING"}


def test_a_living_run_is_left_alone(home: Path, server: Server) -> None:
    """However long it was silent: it may be compiling, swapping, or stopped in a debugger."""
    begun = begin(home, "toy-1")
    server.add("toy-1", StateType.RUNNING, ago=timedelta(days=3))
    assert cycle(server, home, resume=True) == []
    assert set(in_mlflow().values()) == {"RUNNING"}
    kill(*begun)


def test_a_training_that_outlives_its_parents_lock_is_not_dead(home: Path, server: Server) -> None:
    """A closed parent and an open child is a moment of every run's end."""
    parent, child = begin(home, "toy-1")
    parent.close()
    assert [run.name for run in unfinished_runs(home)] == ["toy-1"]
    assert ("journal", "toy-1", "done") not in cycle(server, home)
    kill(child)
    assert ("journal", "toy-1", "done") in cycle(server, home)


@pytest.mark.parametrize(
    ("state", "status", "told", "in_store"),
    [
        (StateType.CANCELLING, None, "Cancelled", "KILLED"),  # asked to stop, and killed at it
        (StateType.RUNNING, "FINISHED", "Completed", "FINISHED"),  # done, but the server was away at the end
        (StateType.RUNNING, "KILLED", "Cancelled", "KILLED"),
        (StateType.RUNNING, "FAILED", "Failed", "FAILED"),
    ],
)
def test_the_final_state_is_the_journals(
    home: Path, server: Server, state: StateType, status: str | None, told: str, in_store: str
) -> None:
    """A run that finished must not be called crashed, nor one that was cancelled."""
    parent, child = begin(home, "toy-1")
    if status:
        child.close(status, "its reason")
        parent.close(status, "its reason")
        as_of(2**22 + 1, parent.path)
    else:
        kill(parent, child)
    server.add("toy-1", state)
    cycle(server, home)
    assert server.told == [("toy-1", told)]
    assert set(in_mlflow().values()) == {in_store}


def test_mlflow_alone_is_behind(home: Path, server: Server) -> None:
    """MLflow was down when the run ended: nobody else would ever tell it."""
    parent, child = begin(home, "toy-1")
    child.close()
    parent.close()
    assert set(in_mlflow().values()) == {"RUNNING"}
    assert cycle(server, home) == [("mlflow", "toy-1", "done")]
    assert set(in_mlflow().values()) == {"FINISHED"}


def test_a_run_of_another_home_is_not_ours_to_end(home: Path, server: Server) -> None:
    """Many homes may share one MLflow; a run without files here is ended only when our Prefect knows that it ended."""
    import shutil

    kill(*begin(home, "toy-1"))
    shutil.rmtree(home / "runs" / "toy-1")
    assert cycle(server, home) == []
    assert set(in_mlflow().values()) == {"RUNNING"}


def test_what_just_began_is_given_time(home: Path, server: Server) -> None:
    server.add("toy-1", StateType.PENDING, ago=timedelta(seconds=20))
    assert cycle(server, home) == []


def test_without_files_silence_decides(home: Path, server: Server) -> None:
    """A data flow has no directory: ten minutes without a heartbeat are its end, five are not."""
    beating = server.add("beats", StateType.RUNNING, ago=timedelta(hours=1))
    server.add("young", StateType.RUNNING)
    server.add("silent", StateType.RUNNING, ago=timedelta(hours=1))
    server.heartbeats = {f"prefect.flow-run.{beating.id}"}
    cycle(server, home)
    assert server.told == [("silent", "Crashed")]


def test_other_projects_flow_runs_are_left_alone(home: Path, server: Server) -> None:
    server.entrypoint = "theirs/flow.py:main"
    server.add("theirs", StateType.RUNNING, ago=timedelta(hours=1))
    server.add("by-hand", StateType.RUNNING, ago=timedelta(hours=1), deployment_id=None)
    assert cycle(server, home) == []


def test_every_flow_of_ours_is_known() -> None:
    """One that was started by hand and died would stay RUNNING for ever."""
    names = re.findall(
        r'@flow\(\s*name="([^"]+)"', "".join(path.read_text() for path in (Path(__file__).parent.parent / "flows").glob("*.py"))
    )
    assert len(names) > 5
    assert set(names) - {"train", "evaluate"} <= set(OWN_FLOWS)


def test_a_subflow_ends_with_the_flow_whose_process_it_shares(home: Path, server: Server) -> None:
    """A nightly run's pipeline: two flow runs, one process, one directory."""
    task_run = uuid4()
    kill(*begin(home, "toy-1"))
    server.add("toy-1", StateType.RUNNING, deployment_id=None, parent_task_run_id=task_run)
    server.add("night", StateType.RUNNING, labels={"task_run": str(task_run)})
    server.read_task_run = lambda _: SimpleNamespace(flow_run_id=server.flow_runs[1].id)  # type: ignore[method-assign]
    cycle(server, home)
    assert sorted(server.told) == [("night", "Crashed"), ("toy-1", "Crashed")]


def test_only_what_died_is_started_again(home: Path, server: Server) -> None:
    """Not what failed with a reason, not what was cancelled, not what dies each time, not what no worker can start."""
    for name in ("died", "often", "by-hand", "failed", "cancelled"):
        journals = begin(home, name, forward=False)
        if name == "failed":
            for journal in reversed(journals):
                journal.close("FAILED", "loss inf at step 3")
        else:
            kill(*journals)
    server.add("died", StateType.RUNNING)
    server.add("often", StateType.RUNNING, run_count=4)
    server.add("by-hand", StateType.RUNNING, deployment_id=None)
    server.add("failed", StateType.CRASHED)
    server.add("cancelled", StateType.CANCELLING)
    found = cycle(server, home, resume=True)
    assert [(what, outcome) for _, what, outcome in sorted(f for f in found if f[0] == "resume")] == [
        ("by-hand", "left"),
        ("died", "done"),
        ("often", "left"),
    ]
    assert [name for name, state in server.told if state == "AwaitingRetry"] == ["died"]


def test_what_crashed_earlier_is_started_again_when_asked(home: Path, server: Server) -> None:
    """The scheduled cycle has closed it in the night; in the morning somebody asks."""
    kill(*begin(home, "toy-1"))
    server.add("toy-1", StateType.RUNNING)
    cycle(server, home)
    assert server.told == [("toy-1", "Crashed")]
    assert cycle(server, home, resume=True) == [("resume", "toy-1", "done")]
    assert server.told[-1] == ("toy-1", "AwaitingRetry")
    assert server.flow_runs[0].state is not None
    assert server.flow_runs[0].state.message == MARK + "resubmitted"


def test_one_failure_does_not_keep_the_rest(home: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("toy-1", "toy-2"):
        kill(*begin(home, name))
        server.add(name, StateType.RUNNING)

    def refuse(*_: Any) -> None:
        raise ConnectionError("503")

    monkeypatch.setattr("gptloom.flows.reconcile.close_journals", refuse)
    assert [outcome for what, _, outcome in cycle(server, home) if what == "journal"] == ["failed", "failed"]
    assert [outcome for what, _, outcome in cycle(server, home) if what == "prefect"] == []
    assert len(server.told) == 2


def test_two_writers_of_one_journal_are_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trainers in one directory overwrite each other's checkpoints."""
    monkeypatch.setattr("gptcore.journal.LOCK_S", 0.1)
    first = Journal(home / "runs" / "toy")
    first.open("toy")
    with pytest.raises(UserError, match="another process"):
        Journal(home / "runs" / "toy")
    assert is_held(first.path)
    first.close()
    assert not is_held(first.path)
    assert last_record(first.path) == {**(last_record(first.path) or {}), "kind": "close", "status": "FINISHED"}


def test_the_last_line_of_a_long_journal(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is longer than what is read at first, and behind it half a line."""
    monkeypatch.setattr("gptcore.journal.TAIL_BYTES", 100)
    journal = Journal(home / "toy")
    assert last_record(journal.path) is None
    for text in ("x" * 500, "y"):
        journal.tags({"a": text})
        with open(journal.path, "ab") as file:
            file.write(b'{"seq": 1, "ki')
        record = last_record(journal.path)
        assert record is not None
        assert record["values"] == {"a": text}
        os.truncate(journal.path, journal.path.stat().st_size - 14)


# --- real processes --------------------------------------------------------------------------------------------------

CHILD = "import signal, sys, time; signal.signal(15, signal.SIG_DFL); print(1, flush=True); time.sleep(60)"
DEAF = CHILD.replace("SIG_DFL", "SIG_IGN")


def start(home: Path, code: str, **environment: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "GPTLOOM_HOME": str(home), **environment}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.read(1)
    return process


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_orphans_are_ended_and_others_are_not(
    home: Path, server: Server, processes: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An orphan holds memory and GPU for ever; a living run's process, or another home's, is nobody's to end."""
    monkeypatch.setattr("gptloom.tasks.runtime.liveness.TERM_S", 1.0)
    ours, orphan, deaf, other = (
        start(home, CHILD, GPTLOOM_PARENT_PID=str(os.getpid())),
        start(home, CHILD, GPTLOOM_PARENT_PID=str(2**22 + 1)),
        start(home, DEAF, GPTLOOM_PARENT_PID=str(2**22 + 1)),
        start(home / "other", CHILD, GPTLOOM_PARENT_PID=str(2**22 + 1)),
    )
    processes += [ours, orphan, deaf, other]
    assert set(ProcessSnapshot.take(home).orphans) == {orphan.pid, deaf.pid}
    assert len([f for f in cycle(server, home) if f[0] == "process"]) == 2
    assert not psutil.pid_exists(orphan.pid)
    assert not psutil.pid_exists(deaf.pid)
    assert ours.poll() is None
    assert other.poll() is None
    assert end_processes([]) == []


def test_a_cancel_that_nobody_obeys_is_obeyed_here(
    home: Path, server: Server, processes: list[subprocess.Popen[bytes]]
) -> None:
    """Cancelled while its worker was dead, a flow run trains on; then it is Cancelled in Prefect and KILLED in MLflow."""
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
from gptcore.journal import Journal
journal = Journal(Path({str(home)!r}) / "runs" / "toy-1")
journal.open("toy-1")
print(1, flush=True)
time.sleep(60)
"""
    flow_run = server.add("toy-1", StateType.CANCELLING)
    processes.append(start(home, code, PREFECT__FLOW_RUN_ID=str(flow_run.id)))
    assert ProcessSnapshot.take(home).flow_runs == {str(flow_run.id): processes[0].pid}
    found = cycle(server, home)
    assert [what for what, _, _ in found] == ["process", "journal", "prefect"], found
    assert {outcome for _, _, outcome in found} == {"done"}
    assert not psutil.pid_exists(processes[0].pid)
    assert server.told == [("toy-1", "Cancelled")]
    record = last_record(home / "runs" / "toy-1" / FILE_NAME)
    assert record is not None
    assert (record["status"], record["reason"]) == ("KILLED", GONE)
    assert time.time() * 1000 - record["time_ms"] < 60_000


def test_slots_are_freed(home: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deployment for one run at a time: the dead one would keep every later one out, night after night."""
    from prefect import get_client
    from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions
    from prefect.states import Pending, Running

    monkeypatch.setattr("gptloom.flows.reconcile.SETTLE", timedelta(0))
    monkeypatch.setattr("gptloom.flows.reconcile.SILENCE", timedelta(0))
    cancel_new = ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(
            client.create_flow_from_name("toy"),
            "one",
            entrypoint="flows/toy.py:toy",
            concurrency_limit=1,
            concurrency_options=cancel_new,
        )

        def begin_run() -> tuple[Any, str]:
            run = client.create_flow_run_from_deployment(deployment)
            result = client.set_flow_run_state(run.id, Pending())
            assert result.state is not None
            return run, result.state.type.value

        dead, state = begin_run()
        assert state == "PENDING"
        client.set_flow_run_state(dead.id, Running())
        assert begin_run()[1] == "CANCELLED", "the slot is taken"
        found = Reconciler(client, home, True, False).run()
        assert [(finding.what, finding.subject, finding.outcome) for finding in found] == [("prefect", dead.name, "done")]
        state_now = client.read_flow_run(dead.id).state
        assert state_now is not None
        assert state_now.is_crashed()
        assert begin_run()[1] == "PENDING", "the slot is free again"

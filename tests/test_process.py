"""Children of tasks: they report, they fail with a reason, and none is left behind. Stand-in children, real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_for
from mlflow import MlflowClient

from gptcore.config import UserError, check_config
from gptcore.entry import is_running
from gptcore.errors import DeviceMemoryError, NonFinite, Stopped
from gptcore.journal import FILE_NAME, read_journal
from gptcore.store import commit_dir
from gptloom.tasks.runtime import process
from gptloom.tasks.runtime.process import ProcessDied, check_device, run_device_process
from gptloom.tasks.training import run_step

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent

# A device process in small: journal, result, or one of the ways to end badly. No torch, so it starts in a moment.
CHILD = """
import os, signal, subprocess, sys, time
from pathlib import Path
from gptcore import entry, errors
from gptcore.config import UserError

def main(argv):
    how, out = argv[0], Path(argv[1])
    stop = entry.StopFlag()
    stop.install()
    (out / "pid").write_text(str(os.getpid()))
    with entry.recording(out, "toy/train") as journal:
        for step in (1, 2, 3):
            journal.metrics({"train/loss": 3.0 / step, "perf/tok_per_sec": 9.0}, tokens_seen=step * 8, step=step)
        if how == "user":
            raise UserError("data.source=x: no such file")
        if how == "bug":
            raise ZeroDivisionError("oh no")
        if how == "nan":
            raise errors.NonFinite("loss inf at step 3")
        if how == "memory":
            raise errors.DeviceMemoryError("too large")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how in ("wait", "family", "deaf"):
            if how == "family":
                grandchild = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
                grandchild.stdout.read(1)
                (out / "grandchild").write_text(str(grandchild.pid))
            (out / "ready").touch()
            while not stop or how == "deaf":
                time.sleep(0.02)
            raise errors.Stopped("stopped at step 3; checkpoint kept")
    print('{"not": "the result"}')
    return {"val_loss": 1.5}

raise SystemExit(entry.run_process(main))
"""


@pytest.fixture
def out(home: Path, mlflow_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a step, with the stand-in importable as `standin` by a child."""
    (tmp_path / "standin.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    directory = home / "runs" / "toy" / "train"
    directory.mkdir(parents=True)
    return directory


def run(how: str, out: Path) -> dict[str, Any]:
    return run_device_process(["standin", how, str(out)], out, experiment="toy", max_steps=4)


def mlflow_status(store: str) -> str:
    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("toy")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    return str(found.info.status)


def interrupt_when_ready(out: Path, number: int = signal.SIGINT) -> None:
    """Ctrl-C for this very process, once the child works."""

    def work() -> None:
        wait_for((out / "ready").exists)
        os.kill(os.getpid(), number)

    threading.Thread(target=work, daemon=True).start()


def test_result_log_and_records(out: Path, mlflow_store: str) -> None:
    assert run("well", out) == {"val_loss": 1.5}  # the last JSON line, not the stray one before it
    assert "not" in (out / process.LOG_NAME).read_text()
    assert mlflow_status(mlflow_store) == "FINISHED"


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("user", UserError, "data.source=x: no such file"),
        ("nan", NonFinite, "loss inf at step 3"),
        ("memory", DeviceMemoryError, "too large"),
        ("bug", RuntimeError, "exit code 1.*ZeroDivisionError: oh no"),
    ],
)
def test_exit_codes_become_exceptions(out: Path, how: str, kind: type[Exception], message: str) -> None:
    """The command's exit code and sentence depend on it: 2, 76, 77, and a bug with the end of its log."""
    with pytest.raises(kind, match=f"(?s){message}"):
        run(how, out)


def test_killed_child_leaves_no_run_open(out: Path, mlflow_store: str) -> None:
    """The kernel's out-of-memory killer gives no chance to close the journal; the task has to."""
    with pytest.raises(RuntimeError, match="SIGKILL"):
        run("kill", out)
    last = read_journal(out / FILE_NAME)[0][-1]
    assert (last["kind"], last["status"]) == ("close", "FAILED")
    assert "SIGKILL" in last["reason"]
    assert mlflow_status(mlflow_store) == "FAILED"


def test_interrupt_stops_child_and_grandchild(out: Path, mlflow_store: str) -> None:
    """The grandchild ignores SIGTERM, as a compiler or data worker may: it has to go with its group."""
    interrupt_when_ready(out)
    with pytest.raises(KeyboardInterrupt):
        run("family", out)
    assert not is_running(int((out / "pid").read_text()))
    grandchild = int((out / "grandchild").read_text())
    wait_for(lambda: not is_running(grandchild))
    last = read_journal(out / FILE_NAME)[0][-1]
    assert (last["status"], last["reason"]) == ("KILLED", "stopped at step 3; checkpoint kept")
    assert mlflow_status(mlflow_store) == "KILLED"


def test_deaf_child_is_killed_after_the_grace(out: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GRACE_S", 0.3)
    interrupt_when_ready(out)
    with pytest.raises(KeyboardInterrupt):
        run("deaf", out)
    assert not is_running(int((out / "pid").read_text()))
    assert mlflow_status(mlflow_store) == "KILLED"


def test_child_stopped_by_someone_else(out: Path) -> None:
    """A SIGTERM to the child alone is a stop with a checkpoint (exit 75), not a failure."""

    def work() -> None:
        wait_for((out / "ready").exists)
        os.kill(int((out / "pid").read_text()), signal.SIGTERM)

    threading.Thread(target=work, daemon=True).start()
    with pytest.raises(Stopped, match="checkpoint kept"):
        run("wait", out)


def test_child_started_from_a_short_lived_thread_lives_on(out: Path) -> None:
    """The parent-death signal fires when the forking *thread* ends; pool threads of Prefect do end."""
    process._start(["standin", "wait", str(out)], out)  # makes the launcher's thread
    wait_for((out / "ready").exists)
    os.kill(int((out / "pid").read_text()), signal.SIGTERM)
    (out / "ready").unlink()
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        started.append(process._start(["standin", "wait", str(out)], out))
        wait_for((out / "ready").exists)  # only now the child has asked for the signal

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    try:
        time.sleep(0.3)
        assert started[0].poll() is None, "died with the thread that asked for it"
    finally:
        process._end(started[0])


def test_child_dies_with_its_killed_parent(out: Path) -> None:
    """A power-cut of the parent (SIGKILL: no handler runs) must still free the device."""
    code = "import sys; from pathlib import Path; from gptloom.tasks.runtime.process import run_device_process as run; run(['standin', 'deaf', sys.argv[1]], Path(sys.argv[1]), experiment='toy')"
    parent = subprocess.Popen([sys.executable, "-c", code, str(out)], cwd=ROOT)
    try:
        wait_for((out / "ready").exists)
        pid = int((out / "pid").read_text())
        assert is_running(pid)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not is_running(pid))


def test_a_step_is_done_while_its_checkpoint_is_there(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever deletes a damaged checkpoint, as the doctor says, must not be told for ever that it is missing."""
    calls, checkpoint = [], out / "checkpoints" / "step_000004"

    def train(*_args: Any, **_options: Any) -> dict[str, Any]:
        calls.append(1)
        with commit_dir(checkpoint, {"kind": "checkpoint"}):
            pass
        return {"checkpoint": str(checkpoint)}

    monkeypatch.setattr("gptloom.tasks.training.run_device_process", train)
    config = check_config({"data": {"source": "text.txt"}})
    for _ in range(2):
        assert run_step("gptcore.train", config, out, "toy", out)["checkpoint"] == str(checkpoint)
    assert len(calls) == 1
    shutil.rmtree(checkpoint)
    run_step("gptcore.train", config, out, "toy", out)
    assert len(calls) == 2


def test_progress_line(out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(process, "REPORT_S", 0.0)
    with caplog.at_level("INFO"):
        run("well", out)
    assert "step 3/4, loss 1.000, 9 tok/s, about 0 s left" in caplog.text


def test_time_over_is_a_failure_and_ends_the_child(out: Path, mlflow_store: str, prefect_server: None, tmp_path: Path) -> None:
    """Prefect raises in the middle of the watch; the child, stopped by us, would otherwise call itself KILLED."""
    from prefect import flow, task

    states: list[Any] = []
    process._start(["standin", "well", str(tmp_path)], tmp_path).wait(60)  # from now on a child starts in a moment

    @task(timeout_seconds=4, persist_result=False)
    def step() -> None:
        run("wait", out)

    @flow(persist_result=False)
    def whole() -> Any:
        states.append(step(return_state=True))

    whole()
    assert states[0].name == "TimedOut"
    assert not is_running(int((out / "pid").read_text()))
    assert read_journal(out / FILE_NAME)[0][-1]["reason"] == "timed out"
    assert mlflow_status(mlflow_store) == "FAILED"


def test_only_a_killed_child_is_tried_again(prefect_server: None) -> None:
    """A retry after a mistake wastes an hour; none after the kernel's kill wastes a night."""
    from prefect import flow, task

    from gptloom.tasks.training import RETRIES

    raised: list[Exception] = []

    @task(**RETRIES | {"retry_delay_seconds": 0}, persist_result=False)
    def step(error: str) -> str:
        raised.append(ProcessDied("SIGKILL") if error == "died" else NonFinite("nan"))
        if len(raised) == 1 or error != "died":
            raise raised[-1]
        return "done"

    @flow(persist_result=False)
    def whole(error: str) -> Any:
        return step(error, return_state=True)

    assert whole("died", return_state=True).is_completed()
    assert len(raised) == 2
    assert whole("nan", return_state=True).is_failed()
    assert len(raised) == 3


def test_failure_is_told_with_code_and_log_in_mlflow(out: Path, mlflow_store: str) -> None:
    """`failed` alone sends people to a machine and a file they may not reach."""
    with pytest.raises(RuntimeError):
        run("bug", out)
    client = MlflowClient(tracking_uri=mlflow_store)
    (found,) = client.search_runs([client.get_experiment_by_name("toy").experiment_id])
    assert found.info.status == "FAILED"
    reason = found.data.tags["gptloom.reason"]
    assert "exit code 1" in reason
    assert "ZeroDivisionError: oh no" in reason
    assert [file.path for file in client.list_artifacts(found.info.run_id)] == [process.LOG_NAME]


def test_a_wrong_argument_of_a_device_process_is_told_as_any_mistake() -> None:
    call = [sys.executable, "-m", "gptcore.evaluate"]
    done = subprocess.run(
        [*call, "nowhere", "--shard", "x", "--depth", "3"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout)["error"].startswith("python -m gptcore.evaluate: unrecognized arguments: --depth 3; see ")


@pytest.mark.parametrize(
    ("train", "word"),
    [({"device": "cuda"}, "train.device=cuda"), ({"device": "cpu", "precision": "fp8"}, "train.precision=fp8")],
)
def test_a_device_that_is_not_there_is_refused_before_a_run_begins(train: dict[str, str], word: str) -> None:
    if train["device"] == "cuda" and shutil.which("nvidia-smi"):
        pytest.skip("there may be a GPU here")
    with pytest.raises(UserError, match=word):
        check_device(check_config({"name": "toy", "train": train}).train)


def test_a_device_that_is_always_there_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual run does not wait for the answer."""
    monkeypatch.setattr(process, "start_process", lambda *_: pytest.fail("a process for nothing"))
    check_device(check_config({"name": "toy", "train": {"device": "auto", "precision": "fp32"}}).train)

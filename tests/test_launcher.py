"""Device processes forked from a warm one are processes like any other: to the kernel, to `ps`, to the reconciler."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import wait_for

from gptcore.entry import PARENT_VARIABLE, is_running
from gptloom.tasks.runtime import launcher
from gptloom.tasks.runtime.launcher import Child, start_process
from gptloom.tasks.runtime.liveness import ProcessSnapshot

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere processes start afresh"),
]

STEP = """
import json, os, signal, sys, time
from gptcore.entry import run_process

def main(argv):
    if argv[0] == "tell":
        return {"word": os.environ.get("WORD"), "argv": argv, "cwd": os.getcwd(), "session": os.getsid(0) == os.getpid(),
                "parent": os.environ["GPTLOOM_PARENT_PID"] == str(os.getppid()), "name": __name__, "stdin": sys.stdin.read(),
                "handlers": [signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, signal.getsignal(signal.SIGINT) is signal.default_int_handler],
                "files": len(os.listdir("/proc/self/fd"))}
    if argv[0] == "kill":
        os.kill(os.getpid(), signal.SIGSEGV)
    if argv[0] == "exit":
        import atexit
        atexit.register(print, "the last words")
        sys.exit(int(argv[1]))
    print("ready", flush=True)
    time.sleep(60)

raise SystemExit(run_process(main))
"""


@pytest.fixture(autouse=True)
def standin(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`standin` can be imported by a child; afterwards its fork server ends."""
    (tmp_path / "standin.py").write_text(STEP)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parent.parent}")
    yield
    for server in list(launcher._current):
        server.close()


def start(tmp_path: Path, *args: str) -> Child:
    with open(tmp_path / "log.txt", "wb") as output:
        return start_process(["standin", *args], output)


def log(tmp_path: Path) -> str:
    return (tmp_path / "log.txt").read_text()


def wait_for_log(tmp_path: Path, text: str) -> None:
    wait_for(lambda: text in log(tmp_path))


def test_a_step_is_what_python_m_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = start(tmp_path, "wait")
    wait_for_log(tmp_path, "ready")
    server = launcher._current[0]
    monkeypatch.setenv("PREFECT_WORD", "ignored")
    child = start(tmp_path, "tell", "a word")
    assert child.wait(60) == 0, log(tmp_path)
    said = json.loads(log(tmp_path).splitlines()[-1])
    files = said.pop("files")
    assert said == {
        "word": None,
        "argv": ["tell", "a word"],
        "cwd": os.getcwd(),
        "session": True,
        "parent": True,
        "name": "__main__",
        "stdin": "",
        "handlers": [True, True],
    }
    assert files <= 5, "a pipe or socket of the server's is left open"
    assert launcher._current == [server], "one server for both"
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait(60) == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(first.pid, 0)


def test_how_it_ended_is_told(tmp_path: Path) -> None:
    assert start(tmp_path, "exit", "76").wait(60) == 76
    assert "the last words" in log(tmp_path), "what was to run at exit did not"
    assert start(tmp_path, "kill").wait(60) == -signal.SIGSEGV
    child = start(tmp_path, "wait")
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.05)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(60) == -signal.SIGTERM


def test_processes_show_their_own_command_and_are_no_orphans(home: Path, tmp_path: Path) -> None:
    child = start(tmp_path, "wait", "--out", "some where")
    wait_for_log(tmp_path, "ready")
    process = psutil.Process(child.pid)
    assert [word for word in process.cmdline() if word] == [sys.executable, "-m", "standin", "wait", "--out", "some where"]
    assert process.environ()[PARENT_VARIABLE] == str(os.getpid())
    assert child.pid not in ProcessSnapshot.take(home).orphans
    os.kill(child.pid, signal.SIGKILL)
    child.wait(60)


def test_a_new_environment_gets_a_new_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read at an import (OMP_NUM_THREADS, PYTHONPATH) must not come from an earlier test, home or flow run."""
    running = start(tmp_path, "wait")
    wait_for_log(tmp_path, "ready")
    monkeypatch.setenv("WORD", "new")
    child = start(tmp_path, "tell")
    assert child.wait(60) == 0
    assert '"word": "new"' in log(tmp_path)
    assert running.poll() is None, "it went with the server that started it"
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait(60) == -signal.SIGTERM


def test_without_its_server_a_step_ends_and_the_next_one_starts(tmp_path: Path) -> None:
    """The kernel may kill any process when memory runs out; nothing may then hold the device, nor hang."""
    child = start(tmp_path, "wait")
    wait_for_log(tmp_path, "ready")
    server = launcher._current[0]._process
    server.terminate()  # sent to all by a shutdown: it stays for the steps
    time.sleep(0.2)
    assert (server.poll(), child.poll()) == (None, None)
    server.kill()
    assert child.wait(60) == -signal.SIGKILL
    wait_for(lambda: not is_running(child.pid), "it lives on")
    assert start(tmp_path, "exit", "3").wait(60) == 3


def test_a_real_step_is_warm(tmp_path: Path) -> None:
    """Guards the point of it: steps that need torch are forks of one process, and their errors arrive as ever."""
    servers = set()
    for _ in range(2):
        with open(tmp_path / "log.txt", "wb") as output:
            child = start_process(["gptcore.train", "nowhere.yaml"], output)
        assert isinstance(child, launcher._ForkedProcess)
        assert child.wait(60) == 2, log(tmp_path)
        servers.add(launcher._current[0]._process.pid)
        assert "nowhere.yaml" in log(tmp_path)
        assert "Warning" not in log(tmp_path)
    assert len(servers) == 1


def test_the_fork_server_only_imports() -> None:
    """A fork of a process that has started CUDA, or a pool of OpenMP threads, or children of its own, hangs or fails."""
    code = """
import torch
asked = []
torch.cuda.is_available = lambda: asked.append("is_available")  # with a GPU that starts its driver, which does not outlive a fork
torch.cuda.device_count = lambda: asked.append("device_count") or 0
from gptcore.forkserver import load
for module in ("gptcore.train", "gptcore.evaluate", "gptcore.generate", "gptcore.studies"):
    load(module)
import os, sys, psutil
assert not asked, asked
assert "torch._dynamo" in sys.modules and "gptcore.train.__main__" in sys.modules
assert not torch.cuda.is_initialized() and not psutil.Process().children()
before = len(os.listdir("/proc/self/task"))
(torch.rand(512, 512) @ torch.rand(512, 512)).sum()  # what starts OpenMP's threads
after = len(os.listdir("/proc/self/task"))
assert after == before + torch.get_num_threads() - 1, (before, after)
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

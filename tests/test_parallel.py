"""Work on all cores: results in order, memory given back, and no process left behind however ours ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, wait_for

from gptcore import parallel
from gptcore.entry import is_running
from gptcore.parallel import in_order, map_processes, run_apart


@pytest.fixture(autouse=True)
def _two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTLOOM_WORKERS", "2")


def late_and_early(number: int) -> tuple[int, int]:
    """Jobs that finish out of turn; which process did them."""
    time.sleep(0.02 * (number % 3 == 0))
    return number, os.getpid()


def test_results_come_in_the_order_of_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards order across workers, and across the workers that replace them."""
    monkeypatch.setattr(parallel, "JOBS_PER_LIFE", 4)
    done = list(map_processes(late_and_early, range(20)))
    assert [number for number, _ in done] == list(range(20))
    processes = {process for _, process in done}
    assert os.getpid() not in processes
    assert 3 <= len(processes) <= 6  # three lives of two


def test_few_jobs_stay_here() -> None:
    assert {process for _, process in map_processes(late_and_early, range(3))} == {os.getpid()}


def test_only_a_few_jobs_are_ahead() -> None:
    """Guards memory and disk: parts that wait to be taken are bounded."""
    submitted: list[int] = []

    class Done:
        def __init__(self, value: int) -> None:
            self.value = value

        def result(self) -> int:
            return self.value

        def cancel(self) -> None:
            submitted.remove(self.value)

    def submit(job: int) -> Done:
        submitted.append(job)
        return Done(job)

    results = in_order(submit, range(10), 3)
    assert next(results) == 0
    assert submitted == [0, 1, 2]
    results.close()
    assert submitted == [0]
    assert list(map_processes(abs, [-1])) == [1]


def fail(number: int) -> int:
    if number == 4:
        raise ValueError("job 4")
    return number


def test_an_error_in_a_worker_is_raised_here() -> None:
    with pytest.raises(ValueError, match="job 4"):
        list(map_processes(fail, range(8)))


def die(number: int) -> int:
    if number == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_is_called_a_lack_of_memory() -> None:
    """Guards against a stack trace of futures where the kernel took a worker for its memory (exit code 77)."""
    with pytest.raises(MemoryError, match="GPTLOOM_WORKERS"):
        list(map_processes(die, range(8)))


def speak() -> int:
    os.write(1, b"noise")
    return os.getpid()


def test_work_apart_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """Guards the last line on stdout: trainers of byte pairs print there."""
    assert run_apart(speak) != os.getpid()
    assert "noise" not in "".join(capfd.readouterr())


PROGRAM = """
import os, sys, time
from gptcore.parallel import map_processes
def work(number):
    open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
    time.sleep(60)
if __name__ == "__main__":
    list(map_processes(work, range(20)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_no_worker_outlives_a_killed_process(tmp_path: Path) -> None:
    """Guards the machine: after a SIGKILL nobody is left to end the workers, so they must end themselves."""
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    pids = tmp_path / "pids"
    pids.mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(tmp_path / "program.py"), str(pids)], env=env)
    try:
        wait_for(lambda: len(list(pids.iterdir())) >= 2, "no worker started")
    finally:
        process.kill()
        process.wait()
    workers = [int(path.name) for path in pids.iterdir()]
    wait_for(lambda: not any(map(is_running, workers)), "workers outlived their process")

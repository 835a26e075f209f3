"""The last one out: ends every process a `gptloom up` leaves behind, also when it was killed without warning.

Its stdin is a pipe that closes when `up` is gone, however it went. Prefect gives each flow run a session of its own and MLflow has
a process under its process, so neither the parent-death signal nor a process group reaches them all. What they all
have is the environment they inherited: `up` puts a mark into it, and whoever carries the mark is ended here.
Without /proc (macOS) only the process groups that `up` wrote into the pipe are ended. Standard library only: it
lives as long as the servers do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

MARK_VARIABLE = "GPTLOOM_UP"
GRACE_S = 5.0


def marked_processes(mark: str) -> list[int]:
    """Ids of the processes of this user that were started with GPTLOOM_UP=mark, without the caller's own."""
    entry = f"{MARK_VARIABLE}={mark}".encode()
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            environment = (directory / "environ").read_bytes().split(b"\0")
        except OSError:  # gone meanwhile, or another user's
            continue
        if entry in environment and int(directory.name) != os.getpid():
            found.append(int(directory.name))
    return found


def end_processes(mark: str, groups: list[int]) -> None:
    """SIGTERM, five seconds to obey it, then SIGKILL until none is left."""
    if not Path("/proc/self/environ").exists():
        for number in (signal.SIGTERM, signal.SIGKILL):
            for group in groups:
                _signal(-group, number)
            time.sleep(GRACE_S)
        return
    for pid in marked_processes(mark):
        _signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while (left := marked_processes(mark)) and time.monotonic() < deadline + GRACE_S:
        if time.monotonic() > deadline:
            for pid in left:
                _signal(pid, signal.SIGKILL)
        time.sleep(0.1)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups = [int(line) for line in sys.stdin if line.strip()]  # ends when the writer does
    end_processes(sys.argv[1], groups)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Start device processes: forked from a process that has imported torch already (Linux), else `python -m …` afresh.

    warm_up("gptcore.train")                                   # optional: the imports, while something else is waited for
    child = start_process(["gptcore.train", …], log_file)      # pid, returncode, poll(), wait() as those of subprocess.Popen

All is started from one thread that lives as long as we do: the parent-death signal follows the thread that forked, and the task
threads of Prefect end. The fork server (gptcore/forkserver.py) is started with the first process, and ends with us.
"""

from __future__ import annotations

import array
import contextlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import IO, Any, Protocol

from gptcore.entry import PARENT_VARIABLE, python_environment
from gptcore.forkserver import PADDING

# What a service client reads, not torch: a change of these needs no other fork server.
CLIENTS = ("PREFECT_", "MLFLOW_")

log = logging.getLogger("gptloom.tasks")


class Child(Protocol):
    """The part of subprocess.Popen that a watched process needs."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> Any: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...


def start_process(args: list[str], output: IO[bytes]) -> Child:
    """`python -m *args`, in a session of its own, with its output in an open file. Returns once it is there, also when interrupted
    meanwhile: then it is ended first."""
    future = _launcher().submit(_start, args, output.fileno())
    try:
        return future.result()
    except BaseException:  # interrupted between the fork and here
        child = future.result()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise


def warm_up(module: str) -> None:
    """Start importing what most steps need. Returns at once."""
    _launcher().submit(_fork_server, module)


@cache
def _launcher() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="gptloom-launcher")


def _environment() -> dict[str, str]:
    return python_environment() | {PARENT_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"}


def _start(args: list[str], log_file: int) -> Child:
    if server := _fork_server():
        try:
            return server.fork(args, log_file)
        except OSError as error:
            log.warning("the fork server is gone (%s); this process starts without it", error)
            server.close()
    return subprocess.Popen(
        [sys.executable, "-m", *args],
        stdin=subprocess.DEVNULL,
        stdout=log_file,
        stderr=subprocess.STDOUT,
        env=_environment(),
        start_new_session=True,
    )


_current: list[_ForkServer] = []  # one at most


def _fork_server(module: str = "") -> _ForkServer | None:
    """The fork server, a new one where there is none with our environment; None where the system has no such thing."""
    if not sys.platform.startswith("linux"):
        return None
    if _current and not _current[0].fits():
        _current.pop().close()  # it ends after its last step
    if not _current:
        _current.append(_ForkServer(module))
    return _current[0]


class _ForkServer:
    """Our end of `python -m gptcore.forkserver`. Used by the launcher's thread only."""

    def __init__(self, module: str) -> None:
        self._environment = _environment()
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gptcore.forkserver", module.ljust(PADDING)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=self._environment,
                start_new_session=True,
            )

    def fits(self) -> bool:
        """Is it alive, and would a process that starts now find the same environment at its imports?"""
        relevant = [
            {name: value for name, value in environment.items() if not name.startswith(CLIENTS)}
            for environment in (self._environment, _environment())
        ]
        return self._process.poll() is None and relevant[0] == relevant[1]

    def fork(self, args: list[str], log_file: int) -> _ForkedProcess:
        """Raises OSError when the server is gone."""
        request = json.dumps({"args": args, "env": _environment(), "cwd": os.getcwd()}).encode()
        told, tell = os.pipe()
        try:
            files = array.array("i", [log_file, tell])
            self._control.sendmsg([len(request).to_bytes(4, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
            self._control.sendall(request)
        except OSError:
            os.close(told)
            raise
        finally:
            os.close(tell)
        return _ForkedProcess(args, told)

    def close(self) -> None:
        self._control.close()
        if self in _current:
            _current.remove(self)


class _ForkedProcess:
    """A child of the fork server, seen through the pipe on which that tells its process id and its exit code."""

    def __init__(self, args: list[str], pipe: int) -> None:
        """Waits until it is there. Raises OSError when the server ends before."""
        self.args = args
        self.returncode: int | None = None
        self._pipe = os.fdopen(pipe, "rb", buffering=0)
        line = self._pipe.readline()
        if not line.endswith(b"\n"):
            self._pipe.close()
            raise ConnectionError("it ended before it could fork")
        self.pid = int(line)

    def poll(self) -> int | None:
        return self._look(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired after `timeout` seconds."""
        code = self._look(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._pipe], [], [], timeout)[0]:
            line = self._pipe.readline()
            self._pipe.close()
            # Without an exit code the server was killed, and the kernel has ended its children with it.
            self.returncode = int(line) if line else -signal.SIGKILL
        return self.returncode

"""A process that imports torch once and from then on is forked into every step: a step starts in a moment, not in two seconds.

    python -m gptcore.forkserver [MODULE]        # started by tasks/runtime/launcher.py, with a socket as stdin; MODULE is imported at once

It does nothing but import and fork: it has one thread, computes nothing and never touches a GPU, so a fork of it is as good as a new
process. A step is then what `python -m MODULE ARGUMENTS` would be: a session of its own with its own log, environment, signals and
command line, and the kernel ends it with this process, as it ends this one with whoever started it. Linux only.

A request is a 4-byte length and JSON (`args, env, cwd`), with two open files: the log, and a pipe on which the step's process id and
at its end its exit code (negative for a signal) come back, a line each. A pipe that closes before says that this process is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, NoReturn

from gptcore.entry import PARENT_VARIABLE, die_with_parent, follow_parent

PADDING = 4096  # bytes of command line, so that a step's own one fits in
LATE = "torch._dynamo"  # 800 modules that torch itself imports once the first weights are drawn
_ENVIRONMENT = dict(os.environ)  # before any import has changed it


def serve(control: socket.socket) -> list[str] | None:
    """Fork a step for every request, until the socket closes and the last step has ended: None. In a step: its `args`."""
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    steps: dict[int, int] = {}  # process id → pipe
    is_open = True
    while is_open or steps:
        ready = select.select([woken, control.fileno()] if is_open else [woken], [], [])[0]
        if woken in ready:
            os.read(woken, 4096)
        for pid in list(steps):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                _tell(steps[pid], os.waitstatus_to_exitcode(status))
                os.close(steps.pop(pid))
        if not is_open or control.fileno() not in ready:
            continue
        request, files = _receive(control)
        if request is None:
            is_open = False
            continue
        log, pipe = files
        load(request["args"][0])
        gc.collect()
        gc.freeze()  # what is shared now stays shared: a step's collector does not touch it
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for file in (woken, wake, *steps.values()):
                os.close(file)
            control.detach()
            _become_step(request, server, log)
            _tell(pipe, os.getpid())
            os.close(pipe)
            return list(request["args"])
        os.close(log)
        steps[pid] = pipe
    return None


def load(module: str) -> None:
    """Import one of our modules, so that all later steps have it. What is wrong with it the step will say itself."""
    if not module.startswith("gptcore."):
        return
    with contextlib.suppress(Exception):
        is_package = importlib.import_module(module).__spec__.submodule_search_locations is not None  # type: ignore[union-attr]
        if is_package:
            importlib.import_module(f"{module}.__main__")
        importlib.import_module(LATE)


def _receive(control: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """The next request and its files; None once the other end is gone."""
    data, files, _, _ = socket.recv_fds(control, 4, 2)
    size = int.from_bytes(data, "little")
    text = b""
    while len(text) < size:
        part = control.recv(size - len(text))
        if not part:
            return None, files
        text += part
    return (json.loads(text) if text else None), files


def _tell(pipe: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody wants to know any more
        os.write(pipe, b"%d\n" % number)


def _become_step(request: dict[str, Any], server: int, log: int) -> None:
    os.setsid()
    die_with_parent(server)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    os.chdir(request["cwd"])
    environment: dict[str, str] = request["env"]
    for name in _ENVIRONMENT.keys() - environment.keys():
        os.environ.pop(name, None)
    os.environ.update({name: value for name, value in environment.items() if _ENVIRONMENT.get(name) != value})
    os.environ[PARENT_VARIABLE] = str(server)
    show_command(["-m", *request["args"]])


def show_command(args: list[str]) -> None:
    """Let `ps` show `python ARGS` for this process: the kernel reads a command line from where the first one was put."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end of proc(5)
        words = b"\0".join(os.fsencode(word) for word in [sys.executable, *args])
        if 0 < start < end:
            ctypes.memmove(start, words[: end - start - 1].ljust(end - start, b"\0"), end - start)


def main() -> None:
    follow_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # sent to all: whoever started us ends the steps in order, and then we end
    show_command(["-m", "gptcore.forkserver"])
    for module in sys.argv[1:]:
        if module.strip():
            load(module)
    # Python 3.12 warns of any other thread. Those of OpenBLAS and of pyarrow's allocator rest, and end or start anew around a fork.
    warnings.filterwarnings("ignore", message=".*multi-threaded", category=DeprecationWarning)
    args = serve(socket.socket(fileno=0))
    if args is None:
        return
    sys.argv[1:] = args[1:]
    # The module was imported for its imports' sake; as `python -m` would, it runs afresh.
    warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
    try:
        runpy.run_module(args[0], run_name="__main__", alter_sys=True)
    except BaseException as end:
        finish(end)
    finish(SystemExit(0))


def finish(end: BaseException) -> NoReturn:
    """End a step as Python ends a program, but for taking apart every module: that copies all that is shared, for half a second."""
    code = 1
    if not isinstance(end, SystemExit):
        sys.excepthook(type(end), end, end.__traceback__)
    elif end.code is None or isinstance(end.code, int):
        code = end.code or 0
    else:
        print(end.code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]  # the threads that are waited for
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 0xFF)


if __name__ == "__main__":
    main()

"""How every `python -m gptcore.…` process begins and ends: exit codes, its parent's death, SIGTERM, the last line.

Output for people goes to stderr, for programs to stdout: the last line there is one JSON object, also after a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import logging
import os
import signal
import site
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from gptcore.config import ExperimentConfig, load_config
from gptcore.errors import EXIT_BUG, EXIT_OK, EXIT_STOPPED, Stopped, UserError, describe_error, exit_code
from gptcore.journal import Journal
from gptcore.store import claim, keep_private

PARENT_VARIABLE = "GPTLOOM_PARENT_PID"
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"  # where torch's agent looks for the reason of each process's failure
RESUMES_TAG = "gptloom.resumes"


class StopFlag:
    """True once SIGTERM or SIGINT arrived; a second signal exits at once.

    Inside `interrupting` the first one raises Stopped there and then, for work that has nothing to save: setting up, compiling,
    evaluating.
    """

    def __init__(self) -> None:
        self._raised_at: float | None = None
        self._interrupts = False
        # torchrun passes on to its processes what a terminal, or whoever ends their group, has sent them already.
        self._echo_s = 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        if self:
            raise Stopped("stopped")
        before, self._interrupts = self._interrupts, True
        try:
            yield
        finally:
            self._interrupts = before

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._raised_at is None:
            self._raised_at = now
            if self._interrupts:
                raise Stopped("stopped before the first step")
        elif now - self._raised_at >= self._echo_s:
            os._exit(EXIT_STOPPED)

    def __bool__(self) -> bool:
        return self._raised_at is not None


def python_environment() -> dict[str, str]:
    """The environment in which we start a Python: it finds gptcore where we found it, and imports nothing from the folder it happens
    to stand in, where a user's own random.py or flows/ may lie."""
    root, path = str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")
    # A folder of Python's own is found anyway, and put first it would come before the standard library.
    if root not in [*site.getsitepackages(), site.getusersitepackages(), *path.split(os.pathsep)]:
        path = os.pathsep.join(filter(None, [root, path]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def follow_parent() -> None:
    """Die with the process that started us (named in GPTLOOM_PARENT_PID), also when it is killed without warning.

    On Linux prctl(PR_SET_PDEATHSIG); the parent may be gone before the call, hence the second look. Elsewhere a thread that looks
    every second. A rank follows torchrun in this way, named or not; and as torchrun itself follows nobody, it looks every second
    at who is behind it.
    """
    named = os.environ.get(PARENT_VARIABLE)
    is_rank = "TORCHELASTIC_RUN_ID" in os.environ
    if named is None and not is_rank:
        return
    parent = os.getppid() if is_rank else int(named or 0)
    die_with_parent(parent)
    if is_rank and named is not None:
        _watch(lambda: is_running(int(named)))


def die_with_parent(parent: int) -> None:
    """Die with our parent, which has this process id; at once, where it is gone already."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
    else:
        _watch(lambda: os.getppid() == parent)
    if os.getppid() != parent:
        os._exit(EXIT_STOPPED)


def _watch(is_well: Callable[[], bool]) -> None:
    """End this process within a second or so of it being false."""

    def look() -> None:
        while is_well():
            time.sleep(1)
        os._exit(EXIT_STOPPED)

    threading.Thread(target=look, daemon=True).start()


def is_running(pid: int) -> bool:
    """Is it there, and more than an entry that waits to be collected?"""
    try:
        if sys.platform.startswith("linux"):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
        os.kill(pid, 0)
    except OSError:  # ended, or another user's by now
        return False
    return True


def run_process(main: Callable[[list[str]], dict[str, Any]]) -> int:
    """Run `main(argv)`; print its result as the last line on stdout; turn exceptions into exit codes and one sentence."""
    follow_parent()
    keep_private()
    os.environ.update(python_environment())  # for what a library starts, too
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    is_first = os.environ.get("RANK", "0") == "0"  # of several processes under torchrun one speaks for all
    try:
        result = main(sys.argv[1:])
    except Exception as error:
        code = exit_code(error)
        if code == EXIT_BUG:
            traceback.print_exc()
        message = describe_error(error)
        print(f"error: {message}", file=sys.stderr)
        if is_first:
            print(json.dumps({"error": message}), flush=True)
        if ERROR_FILE_VARIABLE in os.environ:
            with contextlib.suppress(OSError), open(os.environ[ERROR_FILE_VARIABLE], "w", encoding="utf-8") as file:
                json.dump({"message": message, "timestamp": int(time.time())}, file)
        return code
    if is_first:
        print(json.dumps(result), flush=True)
    return EXIT_OK


def read_experiment(argv: list[str]) -> ExperimentConfig:
    """`CONFIG.yaml [section.field=value …]` as a configuration. Raises UserError for anything else."""
    if not argv or argv[0].startswith("-"):
        raise UserError(f"usage: {_program()} CONFIG.yaml [section.field=value …]")
    return load_config(argv[0], argv[1:])


def _program() -> str | None:
    module = sys.modules["__main__"].__spec__
    return f"python -m {module.name.removesuffix('.__main__')}" if module else None


class _ProcessParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def process_parser(description: str | None, positional: str, help_text: str) -> argparse.ArgumentParser:
    """The arguments that all device processes share: what to do first, then where. A mistake in them is a UserError."""
    parser = _ProcessParser(prog=_program(), description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(positional, type=Path, help=help_text)
    parser.add_argument("--shards", type=Path, help="directory of a shard set")
    parser.add_argument("--out", type=Path, help="directory for journal and results")
    parser.add_argument("--run", help="name of this run (default: the name of --out)")
    parser.add_argument("--parent", help="name of the run that this one is nested in")
    return parser


def short_title(run: str) -> str:
    """`train 05f3` for `smoke-…-05f3/train`: in a table of runs the step comes first, and those of two runs can be told apart."""
    root, *rest = run.split("/")
    return f"{rest[-1]} {root.rsplit('-', 1)[-1]}" if rest else run


@contextmanager
def recording(directory: Path, run: str | None = None, parent: str | None = None) -> Iterator[Journal]:
    """A journal in `directory` that is closed whatever happens: FINISHED, KILLED when stopped, else FAILED with the reason.

    Raises UserError while another process has one there. A run that was there before is tagged with the number of its resumes.
    """
    run = run or directory.resolve().name
    with claim(directory):
        journal = Journal(directory)
        journal.open(run, parent, title=short_title(run))
        if journal.restarts:
            journal.tags({RESUMES_TAG: str(journal.restarts)})
        try:
            yield journal
        except BaseException as error:
            is_stop = isinstance(error, (Stopped, KeyboardInterrupt))
            journal.close("KILLED" if is_stop else "FAILED", describe_error(error))
            raise
        journal.close()

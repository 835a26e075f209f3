"""Start one `python -m gptcore.…` process, watch it, and leave nothing behind: the only place that starts device work.

The child is a session of its own, so a crash or a cancel frees the device; its journal is tailed for progress in Prefect and
forwarded to MLflow from a thread, so neither service can slow the training down.

    result = run_device_process(["gptcore.train", "config.yaml", "--shards", …], directory, experiment="shakespeare")
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from prefect.exceptions import CancelledRun, MissingContextError
from prefect.logging import get_run_logger

from gptcore.config import UserError
from gptcore.entry import (
    EXIT_MEMORY,
    EXIT_NON_FINITE,
    EXIT_STOPPED,
    EXIT_USER,
    PARENT_VARIABLE,
    DeviceMemoryError,
    NonFinite,
    Stopped,
)
from gptcore.journal import FILE_NAME, Journal, read_journal
from tasks.tracking import Forwarder

LOG_NAME = "log.txt"
GRACE_S = 20.0  # Prefect kills its own process 30 s after a cancel
POLL_S = 0.2
REPORT_S = 5.0


def run_logger() -> logging.Logger | logging.LoggerAdapter[Any]:
    """Prefect's logger of the run we are in; a plain one outside of runs."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger("gptloom.tasks")


def run_device_process(
    args: list[str],
    directory: Path,
    *,
    experiment: str,
    tags: Mapping[str, str] | None = None,
    max_steps: int | None = None,
) -> dict[str, Any]:
    """Run `python -m *args` to its end; returns the JSON object of its last line.

    Output goes to `directory/log.txt`; journals below `directory` go to MLflow's `experiment`, with `tags` on every run.
    `max_steps` (optimizer steps) makes a progress bar of the journal's steps.

    Raises UserError, Stopped, NonFinite or DeviceMemoryError when the child says so by its exit code, else RuntimeError with
    its last lines. However this function is left, the child's whole process group is gone and its journal closed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with Forwarder(directory, experiment, tags).follow():
        try:
            _watch(_start(args, directory), directory, max_steps)
            return _result(args, directory)
        except BaseException as error:
            close_journals(directory, error)
            raise


def close_journals(directory: Path, error: BaseException) -> None:
    """Write the closing line that a process which died could not."""
    for path in directory.rglob(FILE_NAME):
        records, _ = read_journal(path)
        if records and records[-1]["kind"] != "close":
            Journal(path.parent).close(*closing_line(error))


def closing_line(error: BaseException) -> tuple[str, str]:
    """A run's last status and reason: KILLED when it was stopped from outside (Ctrl-C, SIGTERM, a cancel), else FAILED."""
    is_interrupt = not isinstance(error, Exception) or isinstance(error, (Stopped, CancelledRun))
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return ("KILLED" if is_interrupt else "FAILED"), reason


@cache
def _launcher() -> ThreadPoolExecutor:
    """One thread that lives as long as we do: the parent-death signal follows the thread that forked, and task threads end."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="gptloom-launcher")


def _start(args: list[str], directory: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, PARENT_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    with open(directory / LOG_NAME, "wb") as output:
        future = _launcher().submit(
            subprocess.Popen,
            [sys.executable, "-m", *args],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            return future.result()
        except BaseException:
            _end(future.result())  # interrupted between the fork and here
            raise


def _watch(process: subprocess.Popen[bytes], directory: Path, max_steps: int | None) -> None:
    """Wait for the process, with a line of progress every few seconds; its whole group is gone afterwards.

    Raises what interrupts the wait, and for exit codes other than 0 what `_failure` makes of them.
    """
    progress = _Progress(directory, max_steps)
    try:
        due = time.monotonic() + REPORT_S
        while process.poll() is None:
            time.sleep(POLL_S)
            if time.monotonic() >= due:
                progress.report()
                due = time.monotonic() + REPORT_S
    finally:
        _end(process)
    progress.report(is_last=process.returncode == 0)
    if process.returncode != 0:
        raise _failure(process.returncode, directory)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, time to save a checkpoint, SIGKILL; the last one always, for grandchildren that outlive their parent."""
    try:
        if process.poll() is None:
            _signal_group(process, signal.SIGTERM)
            process.wait(GRACE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):  # too slow, or the user insists
        pass
    finally:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)  # its own session, so its pid names the group


def _result(args: list[str], directory: Path) -> dict[str, Any]:
    result = _last_json(directory / LOG_NAME)
    if result is None:
        raise RuntimeError(
            f"python -m {args[0]} ended well but printed no result; its output is {directory / LOG_NAME}"
        )
    return result


def _failure(code: int, directory: Path) -> Exception:
    """The exception that stands for a child's exit code."""
    path = directory / LOG_NAME
    message = (_last_json(path) or {}).get("error")
    kinds = {EXIT_USER: UserError, EXIT_STOPPED: Stopped, EXIT_NON_FINITE: NonFinite, EXIT_MEMORY: DeviceMemoryError}
    if message and code in kinds:
        return kinds[code](message)
    if code == EXIT_STOPPED:
        return Stopped("stopped before its first checkpoint")
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    tail = "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
    return RuntimeError(f"the process of step {directory.name} {how}; the end of {path}:\n{tail}")


def _last_json(path: Path) -> dict[str, Any] | None:
    """The last line that is a JSON object; stray lines of libraries may follow it."""
    for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        if line.startswith("{"):
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                return value
    return None


class _Progress:
    """One readable line, and Prefect's progress bar, from the newest lines of the step's own journal."""

    def __init__(self, directory: Path, max_steps: int | None) -> None:
        self._directory = directory
        self._max_steps = max_steps
        self._offset = 0
        self._values: dict[str, float] = {}
        self._first: dict[str, Any] | None = None
        self._newest: dict[str, Any] | None = None
        self._last_line = ""
        self._artifact: Any = None
        self._is_shown = bool(max_steps) and TaskRunContext.get() is not None
        self._show(0.0)

    def report(self, *, is_last: bool = False) -> None:
        self._read()
        line = self._training_line() if self._max_steps else self._log_line()
        if line and line != self._last_line:
            run_logger().info("%s", line)
            self._last_line = line
        self._show(100.0 if is_last else self._percent())

    def _read(self) -> None:
        records, self._offset = read_journal(self._directory / FILE_NAME, self._offset)
        for record in records:
            if record["kind"] == "metrics":
                self._first = self._first or record
                self._newest = record
                self._values.update(record["values"])

    def _percent(self) -> float:
        return 100.0 * self._newest["step"] / self._max_steps if self._newest and self._max_steps else 0.0

    def _training_line(self) -> str:
        if not self._newest or not self._first or not self._max_steps:
            return ""
        parts = [f"step {self._newest['step']}/{self._max_steps}"]
        for key, form in (
            ("train/loss", "loss {:.3f}"),
            ("val/loss", "val {:.3f}"),
            ("perf/tok_per_sec", "{:,.0f} tok/s"),
        ):
            if key in self._values:
                parts.append(form.format(self._values[key]))
        steps, seconds = (
            self._newest["step"] - self._first["step"],
            (self._newest["time_ms"] - self._first["time_ms"]) / 1000,
        )
        if steps > 0:
            parts.append(f"about {seconds / steps * (self._max_steps - self._newest['step']):.0f} s left")
        return ", ".join(parts)

    def _log_line(self) -> str:
        """The newest line of the child's log that is meant for people."""
        text = (self._directory / LOG_NAME).read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("{")]
        return re.sub(r"^\d\d:\d\d:\d\d ", "", lines[-1]) if lines else ""

    def _show(self, percent: float) -> None:
        if not self._is_shown:
            return
        try:
            if self._artifact is None:
                step = re.sub(r"[^a-z0-9]+", "-", self._directory.name.lower())
                self._artifact = create_progress_artifact(
                    percent, key=f"{step}-progress", description=f"optimizer steps of {step}"
                )
            else:
                update_progress_artifact(self._artifact, percent)
        except Exception as error:  # a picture of the work must not stop the work
            self._is_shown = False
            run_logger().warning("no progress bar: Prefect's server says %s", error)

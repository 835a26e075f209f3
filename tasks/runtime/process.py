"""Run one `python -m gptcore.…` process (started by tasks/runtime/launcher.py), watch it, and leave nothing behind: the only place that
starts device work.

The child is a session of its own, so a crash or a cancel frees the device; its journal is tailed for progress in Prefect and
forwarded to MLflow from a thread, so neither service can slow the training down.

    result = run_device_process(["gptcore.train", "config.yaml", "--shards", …], directory, experiment="shakespeare")
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextvars import copy_context
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Thread
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from prefect.exceptions import CancelledRun

from gptcore.config import TrainConfig, UserError
from gptcore.errors import EXIT_STOPPED, EXIT_USER, Stopped, error_of
from gptcore.journal import FILE_NAME, Journal, last_record, read_journal
from gptcore.studies import CELL_FILE
from gptloom.tasks.records.forwarding import Forwarder, write_tags
from gptloom.tasks.runtime.launcher import Child, start_process
from gptloom.tasks.runtime.log import run_logger

LOG_NAME = "log.txt"
GRACE_S = 20.0  # Prefect kills its own process 30 s after a cancel
POLL_S = 0.2
REPORT_S = 5.0
MAX_TAIL, MAX_REASON = 2000, 5000  # characters of a log's end, of a reason; an MLflow tag holds 6000


def run_device_process(
    args: list[str],
    directory: Path,
    *,
    experiment: str,
    tags: Mapping[str, str] | None = None,
    max_steps: int | None = None,
    cells: int | None = None,
) -> dict[str, Any]:
    """Run `python -m *args` to its end; returns the JSON object of its last line.

    Output goes to `directory/log.txt`; journals below `directory` go to MLflow's `experiment`, with `tags` on every run.
    `max_steps` (optimizer steps) makes a progress bar of the journal's steps, `cells` (of a study) of those that are measured.

    Raises UserError, Stopped, NonFinite or DeviceMemoryError when the child says so by its exit code, ProcessDied when a signal
    ended it, else RuntimeError; the last two with its last lines. However this function is left, the child's whole process group is
    gone and its journal closed.
    """
    write_tags(directory, tags or {})
    with Forwarder(directory, experiment).follow():
        try:
            _watch(_start(args, directory), directory, max_steps, cells)
            return _result(args, directory)
        except BaseException as error:
            try:
                close_journals(directory, error)
            except OSError as trouble:  # a full disk: what went wrong first is the news
                run_logger().warning("the journals below %s could not be closed: %s", directory, trouble)
            raise


def check_device(train: TrainConfig) -> None:
    """Raises UserError when this machine lacks the device or the precision that a training asks for. torch is asked, in a process of its
    own: it alone knows. Where that process fails in another way, the training will say how."""
    if train.device != "cuda" and train.precision in ("auto", "fp32"):
        return
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / LOG_NAME
        with open(log, "wb") as output:
            child = start_process(["gptcore.device", train.device, train.precision], output)
        try:
            code = child.wait()
        finally:
            _end(child)
        if code == EXIT_USER:
            raise UserError((_last_json(log) or {})["error"])


class ProcessDied(RuntimeError):
    """A signal ended the child that we did not send: a fault of the machine, or of whoever sent it; a checkpoint may be there."""


def close_journals(directory: Path, error: BaseException | None) -> None:
    """Write the closing line that a process which died could not; and the whole reason, with its log, where it failed.

    error: None for a run that ended well, and whose closing line was lost.
    """
    status, reason = closing_line(error)
    for path in directory.rglob(FILE_NAME):
        last = last_record(path)
        if last is None:
            continue
        is_own = path.parent == directory
        if last["kind"] != "close" or (is_own and status == "FAILED" and (last["status"], last["reason"]) != (status, reason)):
            journal = Journal(path.parent)
            if is_own and (directory / LOG_NAME).exists():
                journal.artifact(LOG_NAME)
            journal.close(status, reason)


def closing_line(error: BaseException | None) -> tuple[str, str]:
    """A run's last status and reason: KILLED when it was stopped from outside (Ctrl-C, SIGTERM, a cancel), else FAILED; FINISHED
    without an error."""
    if error is None:
        return "FINISHED", ""
    if isinstance(error, asyncio.CancelledError):  # what Prefect raises in a task whose time is over
        return "FAILED", "timed out"
    is_interrupt = not isinstance(error, Exception) or isinstance(error, (Stopped, CancelledRun))
    return ("KILLED" if is_interrupt else "FAILED"), str(error).strip()[:MAX_REASON] or type(error).__name__


def _start(args: list[str], directory: Path) -> Child:
    _keep_log(directory)
    with open(directory / LOG_NAME, "wb") as output:
        return start_process(args, output)


def _keep_log(directory: Path) -> None:
    """The log of an earlier attempt gets a number; a result is only looked for in the newest one."""
    log = directory / LOG_NAME
    if log.exists():
        log.rename(directory / f"log.{len(list(directory.glob('log.*.txt'))) + 1}.txt")


def _watch(process: Child, directory: Path, max_steps: int | None, cells: int | None = None) -> None:
    """Wait for the process, with a line of progress every few seconds; its whole group is gone afterwards.

    Raises what interrupts the wait, and for exit codes other than 0 what `_failure` makes of them.
    """
    progress = _Progress(directory, max_steps, cells)
    try:
        due = time.monotonic() + REPORT_S
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
            if time.monotonic() >= due:
                progress.report()
                due = time.monotonic() + REPORT_S
    finally:
        _end(process)
    progress.report(is_last=process.returncode == 0)
    if process.returncode != 0:
        raise _failure(process.returncode, directory)


def _end(process: Child) -> None:
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


def _signal_group(process: Child, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)  # its own session, so its pid names the group


def _result(args: list[str], directory: Path) -> dict[str, Any]:
    result = _last_json(directory / LOG_NAME)
    if result is None:
        raise RuntimeError(f"python -m {args[0]} ended well but printed no result; its output is {directory / LOG_NAME}")
    return result


def _failure(code: int, directory: Path) -> Exception:
    """The exception that stands for a child's exit code."""
    path = directory / LOG_NAME
    message = (_last_json(path) or {}).get("error")
    if message and code == EXIT_USER:
        return UserError(message)
    if code == EXIT_STOPPED:
        return Stopped(message or "stopped before its first checkpoint")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    tail = "\n".join(line[:300] for line in lines if not line.startswith('{"error"'))[-MAX_TAIL:]
    end = f"the end of {path}:\n{tail}"
    if message and (kind := error_of(code)) is not RuntimeError:
        return kind(f"{message} (exit code {code})\n{end}")
    if code < 0:
        who = " (the kernel does this when memory runs out)" if -code == signal.SIGKILL else ""
        return ProcessDied(f"the process of step {directory.name} was killed by {signal.Signals(-code).name}{who}; {end}")
    return RuntimeError(f"the process of step {directory.name} failed with exit code {code}; {end}")


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
    """One readable line, and Prefect's progress bar, from the newest lines of the step's own journal, or from a study's cells."""

    def __init__(self, directory: Path, max_steps: int | None, cells: int | None) -> None:
        self._directory = directory
        self._max_steps = max_steps
        self._cells = cells
        self._offset = 0
        self._values: dict[str, float] = {}
        self._first: dict[str, Any] | None = None
        self._newest: dict[str, Any] | None = None
        self._last_line = ""
        step = re.sub(r"[^a-z0-9]+", "-", directory.name.lower())
        key, unit = (f"cells-{step}", f"of {cells} cells") if cells else (f"{step}-progress", f"optimizer steps of {step}")
        self._bar = _ProgressBar(key, unit) if (cells or max_steps) and TaskRunContext.get() is not None else None

    def report(self, *, is_last: bool = False) -> None:
        self._read()
        line = self._training_line() if self._max_steps else self._log_line()
        if line and line != self._last_line:
            run_logger().info("%s", line)
            self._last_line = line
        if self._bar is not None:
            self._bar.show(100.0 if is_last else self._percent())
            if is_last:
                self._bar.close()

    def _read(self) -> None:
        records, self._offset = read_journal(self._directory / FILE_NAME, self._offset)
        for record in records:
            if record["kind"] == "metrics":
                if self._newest is None or self._newest["attempt"] != record["attempt"]:
                    self._first = self._newest = record  # an interruption is no time of training
                # What belongs to no step, as the gradient check, is told as of step 0.
                elif record["step"] >= self._newest["step"]:
                    self._newest = record
                self._values.update(record["values"])

    def _percent(self) -> float:
        if self._cells:
            return 100.0 * len(list(self._directory.glob(f"*/{CELL_FILE}"))) / self._cells
        return 100.0 * self._newest["step"] / self._max_steps if self._newest and self._max_steps else 0.0

    def _training_line(self) -> str:
        if not self._newest or not self._first or not self._max_steps:
            return ""
        parts = [f"step {self._newest['step']}/{self._max_steps}"]
        for key, form in (("train/loss", "loss {:.3f}"), ("val/loss", "val {:.3f}"), ("perf/tok_per_sec", "{:,.0f} tok/s")):
            if key in self._values:
                parts.append(form.format(self._values[key]))
        steps, seconds = (self._newest["step"] - self._first["step"], (self._newest["time_ms"] - self._first["time_ms"]) / 1000)
        if steps > 0:
            parts.append(f"about {seconds / steps * (self._max_steps - self._newest['step']):.0f} s left")
        return ", ".join(parts)

    def _log_line(self) -> str:
        """The newest line of the child's log that is meant for people."""
        text = (self._directory / LOG_NAME).read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("{")]
        return re.sub(r"^\d\d:\d\d:\d\d ", "", lines[-1]) if lines else ""


class _ProgressBar:
    """Prefect's progress artifact, from a thread of its own: a server that is away for minutes holds only that thread up."""

    def __init__(self, key: str, description: str) -> None:
        self._key, self._description = key, description
        self._percent: Queue[float | None] = Queue(1)  # the newest one only
        context = copy_context()  # in which Prefect finds the task run
        self._thread = Thread(target=context.run, args=(self._work,), name="gptloom-progress", daemon=True)
        self._thread.start()
        self.show(0.0)

    def show(self, percent: float | None) -> None:
        with contextlib.suppress(Empty):
            self._percent.get_nowait()
        with contextlib.suppress(Full):
            self._percent.put_nowait(percent)

    def close(self) -> None:
        """What was shown last is on its way; that is waited for a moment only."""
        deadline = time.monotonic() + 2.0
        while not self._percent.empty() and time.monotonic() < deadline:
            time.sleep(0.02)
        self.show(None)
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        artifact: Any = None
        while (percent := self._percent.get()) is not None:
            try:
                if artifact is None:
                    artifact = create_progress_artifact(percent, key=self._key, description=self._description)
                else:
                    update_progress_artifact(artifact, percent)
            except Exception as error:  # a picture of the work must not stop the work
                run_logger().warning("the progress bar stands still: Prefect's server says %s", error)

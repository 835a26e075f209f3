"""The append-only record of a run: JSON lines, the truth of which MLflow is a view.

A line is `{"seq", "attempt", "time_ms", "kind", …}`; the kinds and their further fields:

    open      run, parent (or null), title, host, pid        close     status FINISHED | FAILED | KILLED, reason
    params    values {key: str | number | bool}   tags      values {key: str}
    metrics   step, tokens_seen, values {key: number}
    dataset   name, digest, source, context, profile {…}
    artifact  path (absolute, or relative to the journal's folder), folder (in MLflow)

Whoever measures appends; `tasks/records/forwarding.py` forwards. Replaying a journal changes nothing that is already there.
A writer holds the file's lock, which the kernel frees however it ends: an unclosed journal that nobody holds is a dead run's.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptcore.config import UserError
from gptcore.locks import take_lock

FILE_NAME = "metrics.jsonl"
TAGS_FILE = "tags.json"  # beside a journal: who, where and which code; of the runs below it too that have none of their own
LOCK_S = 2.0  # a look at the lock holds it for an instant; another writer holds it for hours
TAIL_BYTES = 1 << 16


class Journal:
    """Writer of `directory/metrics.jsonl`. Opening it again continues it, as the next attempt.

    Raises UserError while another process writes there.
    """

    _fd = -1

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / FILE_NAME
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        with contextlib.suppress(OSError):  # a file system without locks
            if not take_lock(self._fd, LOCK_S):
                raise UserError(f"{directory}: another process writes this run; stop it, or give another directory")
        records, whole = read_journal(self.path)
        os.truncate(self.path, whole)  # a kill can leave half a line; it was never read by anyone
        self.restarts = sum(record["kind"] == "open" for record in records)  # earlier processes of this run
        self._seq = records[-1]["seq"] + 1 if records else 0
        self.attempt = records[-1]["attempt"] + 1 if records else 0

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def open(self, run: str, parent: str | None = None, title: str = "") -> None:
        """`run` is the run's name everywhere; `parent` the name of the run it is nested in."""
        self._append("open", run=run, parent=parent, title=title or run, host=socket.gethostname(), pid=os.getpid())

    def params(self, values: Mapping[str, Any]) -> None:
        self._append("params", values=dict(values))

    def tags(self, values: Mapping[str, str]) -> None:
        self._append("tags", values=dict(values))

    def metrics(self, values: Mapping[str, float], *, tokens_seen: int, step: int = 0) -> None:
        """Numbers at one point of the run; MLflow's x-axis is `tokens_seen`. All must be finite."""
        for key, value in values.items():
            assert math.isfinite(value), f"metric {key}={value}: a measurement that failed is an error, never a number"
        self._append("metrics", step=step, tokens_seen=tokens_seen, values={k: float(v) for k, v in values.items()})

    def dataset(self, name: str, digest: str, source: str, context: str, profile: Mapping[str, Any]) -> None:
        self._append("dataset", name=name, digest=digest, source=source, context=context, profile=dict(profile))

    def artifact(self, path: Path | str, folder: str = "") -> None:
        self._append("artifact", path=str(path), folder=folder)

    def close(self, status: str = "FINISHED", reason: str = "") -> None:
        assert status in ("FINISHED", "FAILED", "KILLED"), status
        self._append("close", status=status, reason=reason)
        os.close(self._fd)
        self._fd = -1

    def _append(self, kind: str, **fields: Any) -> None:
        record = {"seq": self._seq, "attempt": self.attempt, "time_ms": time.time_ns() // 1_000_000, "kind": kind, **fields}
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        written = os.write(self._fd, line)  # one write per line: a reader sees whole lines in order
        if written < len(line):  # the disk is full: take the piece back, so that the next line does not join it
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._seq += 1


class NoJournal(Journal):
    """For processes that are not the one that writes."""

    restarts = 0

    def __init__(self) -> None:
        pass

    def _append(self, kind: str, **fields: Any) -> None:
        pass


def read_journal(path: Path, offset: int = 0, limit: int = -1) -> tuple[list[dict[str, Any]], int]:
    """The whole lines from byte `offset` on, and the offset to continue from. A missing file has no lines yet.

    limit: bytes to read at most (-1: all), but one line at least.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(limit)
            while limit > 0 and b"\n" not in data and (more := file.read(limit)):
                data += more
    except FileNotFoundError:
        return [], offset
    whole = data.rfind(b"\n") + 1
    return [json.loads(line) for line in data[:whole].splitlines()], offset + whole


def last_record(path: Path) -> dict[str, Any] | None:
    """The newest whole line, without reading what stands before it; None for a journal without one."""
    try:
        return read_last_record(path)[0]
    except IndexError:
        return None


def read_last_record(path: Path) -> tuple[dict[str, Any], int]:
    """The last whole line of a journal that has one, and the byte after it; the rest is not read."""
    with open(path, "rb") as file:
        start = size = file.seek(0, os.SEEK_END)
        data = b""
        while True:
            start = max(0, start - TAIL_BYTES)
            file.seek(start)
            data = file.read(size - start)
            lines = data[: data.rfind(b"\n") + 1].splitlines()
            if start == 0 or len(lines) > 1:
                return json.loads(lines[-1]), start + data.rfind(b"\n") + 1

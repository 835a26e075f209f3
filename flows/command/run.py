"""`gptloom run` and `gptloom sync`: the main job, and what MLflow missed of it."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from gptcore.config import UserError, hide_password, load_config
from gptcore.errors import EXIT_BUG, EXIT_OK
from gptloom.flows.command.surroundings import (
    check_source,
    find_experiment,
    launch_prefect_server,
    prepare_home,
    quiet_expected_errors,
    start_prefect_server,
    use_servers,
)

CONTRACT = ("run", "flow_run_id", "mlflow_run_id", "val_loss", "val_bpb", "checkpoint", "report", "seconds")


def run_experiment(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """`gptloom run`: check what can be checked in a moment, then the flow."""
    words = [*filter(None, [args.experiment]), *args.overrides]
    experiment, overrides = ("", words) if args.resume else ("".join(map(find_experiment, words[:1])), words[1:])
    if not experiment and not args.resume:
        raise UserError(
            "gptloom run: EXPERIMENT.yaml is missing; give an experiment file, e.g. experiments/smoke.yaml, or --resume RUN"
        )
    config = load_config(experiment, overrides) if experiment else None
    if config is not None:
        check_source(config.data)
    home = prepare_home()
    use_servers()
    where = hide_password(os.environ.get("PREFECT_API_URL", "a temporary server"))
    launch_prefect_server()  # it comes up while we import, and so does what the steps need
    from gptloom.tasks.runtime.launcher import warm_up

    warm_up("gptcore.train")
    from gptloom.tasks.records.runs import run_named
    from gptloom.tasks.records.tracking import check_store
    from gptloom.tasks.runtime.process import check_device

    store = check_store()
    resume = run_named(args.resume) if args.resume else ""
    print(f"{experiment or resume}: Prefect at {where}, MLflow at {hide_password(store)}", file=sys.stderr)
    from gptloom.flows.forms import Overrides
    from gptloom.flows.pipeline import pipeline
    from gptloom.flows.run import load_run, new_run_name

    if config is None:
        config = load_run(resume, overrides)
    check_device(config.train)  # meanwhile the server comes up
    start_prefect_server()
    quiet_expected_errors()
    result["run"] = resume or new_run_name(config.name)
    print(f"should it be interrupted: gptloom run --resume {result['run']}", file=sys.stderr)
    flow = pipeline.with_options(flow_run_name=result["run"])
    outcome = flow(experiment=experiment, overrides=Overrides(more=overrides), resume=resume)
    result.update({key: outcome[key] for key in CONTRACT})
    from gptcore.report import comparison_table, format_comparison, headline

    directory = home / "runs" / result["run"]
    table = format_comparison(comparison_table(directory)).to_string(index=False)
    print(f"\n{table}\n\n{headline(directory)}\nreport: {directory / 'report.html'}", file=sys.stderr)


def sync_runs(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """`gptloom sync`: journals to MLflow. Exit code 1 when it still misses some: it did not answer half-way."""
    from gptloom.tasks.records.runs import sync
    from gptloom.tasks.records.tracking import check_store

    check_store()
    result.update(sync(args.runs))
    return EXIT_BUG if result["missing"] else EXIT_OK

"""The `gptloom` command. Output for people goes to stderr; the last line on stdout is one JSON object, also after a failure.

gptloom run experiments/shakespeare.yaml train.max_steps=200
gptloom run --resume RUN      # a run that was interrupted, from where it was
gptloom sync        # MLflow gets what it missed while it was away
gptloom study timing --smoke
gptloom up          # Prefect and MLflow with their UIs, until Ctrl-C or `gptloom down`
"""

from __future__ import annotations

import json
import sys

if sys.version_info < (3, 11):  # noqa: UP036 - for whoever runs this file with another Python than the installed one
    _message = "gptloom needs Python 3.11 to 3.13, found " + sys.version.split()[0]
    sys.stderr.write("error: " + _message + "\n")
    sys.stdout.write(json.dumps({"error": _message}) + "\n")
    raise SystemExit(2)

import argparse
import atexit
import contextlib
import gc
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from gptcore.config import DataConfig, UserError, hide_password, load_config
from gptcore.entry import EXIT_BUG, EXIT_OK, EXIT_STOPPED, EXIT_USER, describe_error, exit_code, python_environment
from gptcore.store import home_dir, keep_private
from gptloom.flows.command.arguments import parse_arguments
from gptloom.flows.command.init import init_project  # noqa: F401
from gptloom.flows.command.surroundings import (
    find_experiment,
    launch_prefect_server,
    prepare_home,
    quiet_expected_errors,
    start_prefect_server,
    use_servers,
)

STUDY_CONTRACT = ("run", "report", "cells", "measured", "cached", "failed", "not_run", "conclusion", "seconds", "mlflow_run_id")
CONTRACT = ("run", "flow_run_id", "mlflow_run_id", "val_loss", "val_bpb", "checkpoint", "report", "seconds")


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    keep_private()
    os.environ.update(python_environment())  # for what Prefect, MLflow and torch start
    atexit.register(gc.freeze)  # else Python looks for cycles among all it has imported, for a second, before it ends
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    verb: Callable[[argparse.Namespace, dict[str, Any]], int] = globals()[args.verb]
    result: dict[str, Any] = {}
    # Verbs that fill `result` have stdout to themselves: whatever else is written there goes to stderr.
    takes_stdout = verb not in (start_servers, stop_servers)
    stdout_for_us = _stdout_to_stderr() if takes_stdout else contextlib.nullcontext(sys.stdout)
    with stdout_for_us as stdout, _signals_interrupt():
        try:
            code = verb(args, result)
        except BaseException as error:
            code = _explain(error, result)
        if result:
            stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
            stdout.flush()
    return code


# --- run ---------------------------------------------------------------------------------------------------------------


def run_experiment(args: argparse.Namespace, result: dict[str, Any]) -> int:
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
    _print_results(home / "runs" / result["run"])
    return EXIT_OK


def sync_runs(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """`gptloom sync`: journals to MLflow. Exit code 1 when it still misses some: it did not answer half-way."""
    from gptloom.tasks.records.runs import sync
    from gptloom.tasks.records.tracking import check_store

    check_store()
    result.update(sync(args.runs))
    return EXIT_BUG if result["missing"] else EXIT_OK


def run_study(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """`gptloom study`: check every cell's config, then the flow. The exit code is 0 once one cell is measured."""
    from gptcore.config.study import find_study, load_study
    from gptcore.studies.engine import check_options

    plan = check_options(load_study(find_study(args.name), args.overrides, smoke=args.smoke))
    home = prepare_home()
    check_source(plan.base.data)
    use_servers()
    start_prefect_server()
    from gptloom.flows.run import new_run_name
    from gptloom.flows.study import StudyForm, study

    quiet_expected_errors()
    result["run"] = new_run_name(plan.name)
    print(f"{plan.config.question} {len(plan.cells)} cells, {home / 'runs' / result['run']}", file=sys.stderr)
    flow = study.with_options(flow_run_name=result["run"])
    outcome = flow(name=args.name, smoke=args.smoke, changes=StudyForm(more=args.overrides))
    result.update({key: outcome[key] for key in STUDY_CONTRACT})
    findings = "".join(f"\n- {finding}" for finding in outcome["findings"])
    print(f"\n{outcome['conclusion']}{findings}\nreport: {outcome['report']}", file=sys.stderr)
    if outcome["measured"] + outcome["cached"] == 0:
        result["error"] = outcome["conclusion"]
        return EXIT_BUG if outcome["failed"] else EXIT_STOPPED
    return EXIT_OK


def work_on_data(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """`gptloom data`: the data part of the pipeline as a flow of its own, or a look at its results."""
    from gptloom.flows.command.look import LOOKS, find_directories

    if args.words[0] in LOOKS:
        if len(args.words) < 2:
            raise UserError(f"gptloom data {args.words[0]} needs an experiment file or a directory below data/")
        result.update(LOOKS[args.words[0]](find_directories(args.words[1], args.words[2:])))
        return EXIT_OK
    experiment, overrides = find_experiment(args.words[0]), args.words[1:]
    config = load_config(experiment, overrides)
    prepare_home()
    check_source(config.data)
    use_servers()
    start_prefect_server()
    from gptloom.flows.data import data
    from gptloom.flows.forms import Overrides

    quiet_expected_errors()
    result.update(data(experiment=experiment, overrides=Overrides(more=overrides)))
    return EXIT_OK


def run_reconciler(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """`gptloom reconcile`: the scheduled flow, started by hand."""
    prepare_home()
    use_servers()
    from gptloom.tasks.records.tracking import check_store

    check_store()
    start_prefect_server()
    from gptloom.flows.reconcile import reconcile

    result.update(reconcile(apply=args.apply, resume=args.resume))
    for finding in result["findings"]:
        print("{what} {subject}: {problem}; {remedy} ({outcome})".format(**finding), file=sys.stderr)
    if not result["findings"]:
        print("Prefect, MLflow, journals and processes agree; nothing to do", file=sys.stderr)
    return EXIT_OK


def run_doctor(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """`gptloom doctor`: see flows/command/doctor.py."""
    from gptloom.flows.command.doctor import FAIL, examine

    for check in examine(home_dir(), full=args.full):
        print(check.line(), file=sys.stderr)
        result.setdefault("checks", []).append(check.as_json())
    result["ok"] = all(check["status"] != FAIL for check in result["checks"])
    return EXIT_OK if result["ok"] else EXIT_USER


def retrain(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """`gptloom nightly`: one night, or several simulated ones."""
    is_simulation = args.simulate is not None
    experiment = "experiments/nights.yaml" if is_simulation else "experiments/shakespeare.yaml"
    if args.words and "=" not in args.words[0]:
        experiment = args.words.pop(0)
    experiment = find_experiment(experiment)
    load_config(experiment, args.words)
    if is_simulation and args.simulate < 1:
        raise UserError(f"--simulate {args.simulate}: there is no night in that; give 1 or more, e.g. --simulate 7")
    prepare_home()
    use_servers()
    start_prefect_server()
    from gptloom.flows.forms import Overrides

    quiet_expected_errors()
    overrides = Overrides(more=args.words)
    if is_simulation:
        from gptloom.flows.simulation import simulate_nights

        result.update(simulate_nights(experiment, overrides, args.simulate))
    else:
        from gptloom.flows.nightly import nightly

        result.update(nightly(experiment, overrides, args.force))
    for night in result.get("nights", [result]):
        shown = (night["night"], night["outcome"], night["champion"] or "-", night["reason"])
        print("night {:>2}  {:<9} champion {:<3} {}".format(*shown), file=sys.stderr)
    return EXIT_USER if result.get("error") else EXIT_OK


def move_champion(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """`gptloom promote` and `gptloom rollback`."""
    prepare_home()
    use_servers()
    start_prefect_server()
    from gptloom.flows import registry

    quiet_expected_errors()
    result.update(getattr(registry, args.move)(args.model, args.reason))
    return EXIT_OK


def check_source(data: DataConfig) -> None:
    """Look at local sources for half a second and say what they will take, so that what is missing, empty or not text is refused
    before anything is started.

    Raises UserError. What must be fetched is looked at by the pipeline, which has retries.
    """
    if not any(":" in source.source.partition("/")[0] for source in data.sources):
        from gptcore.corpus import estimate

        print(f"source: {estimate(data, home_dir())}", file=sys.stderr)


def _print_results(directory: Path) -> None:
    from gptcore.report import comparison_table, format_comparison, headline

    table = format_comparison(comparison_table(directory)).to_string(index=False)
    print(f"\n{table}\n\n{headline(directory)}\nreport: {directory / 'report.html'}", file=sys.stderr)


# --- up, down ------------------------------------------------------------------------------------------------------------


def start_servers(args: argparse.Namespace, _result: dict[str, Any]) -> int:
    from gptloom.flows.servers.listening import check_port_number

    check_port_number(args.prefect_port, "--prefect-port")
    check_port_number(args.mlflow_port, "--mlflow-port")
    prepare_home()
    from gptloom.flows.servers import stack as servers

    return servers.up(args.host, args.prefect_port, args.mlflow_port)


def stop_servers(_args: argparse.Namespace, _result: dict[str, Any]) -> int:
    from gptloom.flows.servers import stack as servers

    return servers.down()


# --- how it ends ---------------------------------------------------------------------------------------------------------


def _explain(error: BaseException, result: dict[str, Any]) -> int:
    """The exit code of what went wrong, with one sentence on stderr; a traceback only for bugs."""
    if isinstance(error, SystemExit):
        raise error
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ in ("CancelledRun", "TerminationSignal"):
        code, message = EXIT_STOPPED, "stopped on request"
    else:
        code, message = exit_code(error), describe_error(error)
    if code == EXIT_BUG:
        logging.getLogger("gptloom").error("this is a bug", exc_info=error)
    print(f"error: {message}", file=sys.stderr)
    result["error"] = message
    return code


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[Any]:
    """Nothing but what is written to the yielded stream reaches stdout, not even from child processes."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(saved), "w", encoding="utf-8") as stdout, contextlib.redirect_stdout(sys.stderr):
            yield stdout
    finally:
        os.dup2(saved, 1)
        os.close(saved)


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGINT both end us as Ctrl-C does: children stopped, runs closed, JSON printed.

    SIGINT has to be asked for too: a shell script starts its background jobs with SIGINT ignored, and Python keeps that.
    """

    def interrupt(_number: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    raise SystemExit(main())

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
import contextlib
import logging
import os
import signal
import subprocess
import textwrap
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from flows.warden import MARK_VARIABLE
from gptcore.config import DataConfig, ExperimentConfig, UserError, hide_password, load_config
from gptcore.entry import (
    EXIT_BUG,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_USER,
    DeviceMemoryError,
    NonFinite,
    Stopped,
    describe_error,
    exit_code,
)
from gptcore.store import home_dir, keep_private

ROOT = Path(__file__).resolve().parent.parent
_wardens: list[subprocess.Popen[bytes]] = []  # their pipes close when we end
STUDY_CONTRACT = (
    "run",
    "report",
    "cells",
    "measured",
    "cached",
    "failed",
    "not_run",
    "conclusion",
    "seconds",
    "mlflow_run_id",
)
CONTRACT = ("run", "flow_run_id", "mlflow_run_id", "val_loss", "val_bpb", "checkpoint", "report", "seconds")
EPILOG = """\
exit codes: 0 done, 2 a mistake in the call or its input, 75 stopped, 76 the loss became infinite, 77 out of memory.
state lives under $GPTLOOM_HOME (default ./.gptloom): data, runs, mlflow.db, prefect."""


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    keep_private()
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["study"]:  # argparse takes no positional words after a flag where none stood before it
        argv = sorted(argv, key=lambda word: word != "study" and not word.startswith("-"))
    args = build_parser().parse_args(argv)
    result: dict[str, Any] = {}
    # Verbs that fill `result` have stdout to themselves: whatever else is written there goes to stderr.
    takes_stdout = args.verb in (
        run_experiment,
        run_study,
        work_on_data,
        sync_runs,
        run_reconciler,
        run_doctor,
        move_champion,
        retrain,
    )
    stdout_for_us = _stdout_to_stderr() if takes_stdout else contextlib.nullcontext(sys.stdout)
    with stdout_for_us as stdout, _signals_interrupt():
        try:
            code = args.verb(args, result)
        except BaseException as error:
            code = _explain(error, result)
        if result:
            stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
            stdout.flush()
    return code


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gptloom",
        description="From raw text to a trained, evaluated language model: one pipeline, Prefect to run it, MLflow to compare it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    run = verbs.add_parser(
        "run",
        help="run an experiment file from text to report",
        description="Run the whole pipeline of an experiment file. Finished data steps are found again by their content.\n"
        "Uses the servers of `gptloom up` if they run; otherwise a temporary Prefect server and MLflow in a SQLite file.",
        epilog=f"fields (default in brackets):\n{describe_fields()}\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument(
        "experiment", metavar="EXPERIMENT.yaml", nargs="?", help="experiment file, e.g. experiments/smoke.yaml"
    )
    run.add_argument(
        "--resume", metavar="RUN", help="go on with an interrupted run (its name or MLflow id), with its own settings"
    )
    run.add_argument(
        "overrides",
        metavar="section.field=value",
        nargs="*",
        default=[],
        help="change a field, e.g. data.source=my.txt train.max_steps=200",
    )
    run.set_defaults(verb=run_experiment)

    data = verbs.add_parser(
        "data",
        help="prepare an experiment's text, or look into what was prepared",
        usage="gptloom data EXPERIMENT.yaml [section.field=value ...]\n"
        "       gptloom data stats|verify|head EXPERIMENT.yaml|DIR [section.field=value ...]",
        description="Source → corpus → vocabulary → shards, without training. stats: sizes, splits, tokens; verify: every byte\n"
        "against its sha256; head: the first records and tokens.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data.add_argument("words", metavar="EXPERIMENT.yaml", nargs="+", help=argparse.SUPPRESS)
    data.set_defaults(verb=work_on_data)

    reconcile = verbs.add_parser(
        "reconcile",
        help="put runs right whose processes died without a word",
        description="Match Prefect's flow runs, MLflow's runs, journals, processes and GPUs; say what is wrong. The same runs by\n"
        "schedule while `gptloom up` is up.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    reconcile.add_argument("--apply", action="store_true", help="put it right; without, nothing is changed")
    reconcile.add_argument("--resume", action="store_true", help="start dead runs again from their last checkpoint")
    reconcile.set_defaults(verb=run_reconciler)

    doctor = verbs.add_parser(
        "doctor",
        help="look whether all is well with this machine, its servers and its files",
        description="One line a check: ok, warn or fail, with the remedy. Exit code 2 when one fails.",
    )
    doctor.add_argument("--full", action="store_true", help="read every byte of checkpoints and shards")
    doctor.set_defaults(verb=run_doctor)
    sync = verbs.add_parser(
        "sync",
        help="bring MLflow up to date with runs that it missed",
        description="Replay the journals of these runs (default: all) to MLflow; what is there already stays as it is.",
    )
    sync.add_argument("runs", metavar="RUN", nargs="*", help="name of a run, or its MLflow id")
    sync.set_defaults(verb=sync_runs)
    study = verbs.add_parser(
        "study",
        help="answer a research question: timing, quantization, accumulation, rnn",
        description="Measure every cell of experiments/studies/NAME.yaml and write a report. Cells measured before are kept, so the\n"
        "same command goes on where it was stopped and measures only what changed.",
        epilog=f"study.FIELD=value changes the study file, options.FIELD=value its options, any other the base experiment.\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    study.add_argument("name", metavar="NAME", help="timing, quantization, accumulation, rnn, or a study file (YAML)")
    study.add_argument(
        "overrides",
        metavar="section.field=value",
        nargs="*",
        default=[],
        help="e.g. study.seeds=[1,2] train.max_steps=50",
    )
    study.add_argument("--smoke", action="store_true", help="the smallest form, to see that everything works")
    study.set_defaults(verb=run_study)

    up = verbs.add_parser(
        "up",
        help="start Prefect, MLflow and a worker, until Ctrl-C",
        description="Start the servers and a worker, register the deployments, print the URLs; Ctrl-C or `gptloom down` stops all of it.",
    )
    up.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)"
    )
    up.add_argument("--prefect-port", type=int, default=4200, help="port of Prefect (default: %(default)s)")
    up.add_argument("--mlflow-port", type=int, default=5000, help="port of MLflow (default: %(default)s)")
    up.set_defaults(verb=start_servers)

    nightly = verbs.add_parser(
        "nightly",
        help="train on what is new, promote the better model",
        usage="gptloom nightly [EXPERIMENT.yaml] [--simulate N] [--force] [section.field=value ...]",
        description="One night: read what is new, train a warm and a fresh model on it, promote the better one or say why not.\n"
        "--simulate N: N nights with planted trouble (experiments/nights.yaml), then a rollback.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    nightly.add_argument("words", metavar="EXPERIMENT.yaml", nargs="*", help=argparse.SUPPRESS)
    nightly.add_argument("--simulate", type=int, metavar="N", help="so many nights with planted trouble, at once")
    nightly.add_argument("--force", action="store_true", help="train also when nothing is new")
    nightly.set_defaults(verb=retrain)

    for name, text in (("promote", "make a model the champion"), ("rollback", "bring the champion before back")):
        move = verbs.add_parser(name, help=text, description=f"In the registry: {text}.")
        move.add_argument("model", metavar="MODEL", help="NAME, NAME@ALIAS, NAME/VERSION or a run (rollback: NAME)")
        move.add_argument("--reason", default="on request", help="kept with the version (default: %(default)s)")
        move.set_defaults(verb=move_champion, move=name)

    down = verbs.add_parser(
        "down", help="stop what `gptloom up` started", description="Stop the servers and the worker of `gptloom up`."
    )
    down.set_defaults(verb=stop_servers)
    return parser


def describe_fields() -> str:
    """Every section.field with default and meaning, from the classes that check them."""
    lines = []
    for section, info in ExperimentConfig.model_fields.items():
        fields = getattr(info.annotation, "model_fields", None)
        if fields is None:
            continue
        lines.append(f"\n  {section}: {(info.annotation.__doc__ or '').strip().splitlines()[0]}")
        for name, field in fields.items():
            default = str(field.default).partition("#")[0]
            text = f"{field.description} [{default}]"
            lines.append(
                textwrap.fill(
                    text,
                    116,
                    initial_indent=f"    {section}.{name:<{28 - len(section)}} ",
                    subsequent_indent=" " * 34,
                    break_on_hyphens=False,
                )
            )
    return "\n".join(lines) + "\n"


# --- run ---------------------------------------------------------------------------------------------------------------


def run_experiment(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """`gptloom run`: check what can be checked in a moment, then the flow."""
    words = [*filter(None, [args.experiment]), *args.overrides]
    experiment, overrides = ("", words) if args.resume else ("".join(words[:1]), words[1:])
    if not experiment and not args.resume:
        raise UserError(
            "gptloom run: EXPERIMENT.yaml is missing; give an experiment file, e.g. experiments/smoke.yaml, or --resume RUN"
        )
    config = load_config(experiment, overrides) if experiment else None
    if config is not None:
        check_source(config.data)
    home = prepare_home()
    use_servers()
    from tasks.runs import run_named
    from tasks.tracking import check_store

    store = check_store()
    resume = run_named(args.resume) if args.resume else ""
    where = hide_password(os.environ.get("PREFECT_API_URL", "a temporary server"))
    print(f"{experiment or resume}: Prefect at {where}, MLflow at {hide_password(store)}", file=sys.stderr)
    from flows.pipeline import Overrides, load_run, new_run_name, pipeline

    if config is None:
        config = load_run(resume, overrides)
    _start_prefect_server()
    _quiet_expected_errors()
    result["run"] = resume or new_run_name(config.name)
    flow = pipeline.with_options(flow_run_name=result["run"])
    outcome = flow(experiment=experiment, overrides=Overrides(more=overrides), resume=resume)
    result.update({key: outcome[key] for key in CONTRACT})
    _print_results(home / "runs" / result["run"])
    return EXIT_OK


def sync_runs(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """`gptloom sync`: journals to MLflow. Exit code 1 when it still misses some: it did not answer half-way."""
    from tasks.runs import sync
    from tasks.tracking import check_store

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
    _start_prefect_server()
    from flows.pipeline import new_run_name
    from flows.study import StudyForm, study

    _quiet_expected_errors()
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
    from flows.look import LOOKS, find_directories

    if args.words[0] in LOOKS:
        if len(args.words) < 2:
            raise UserError(f"gptloom data {args.words[0]} needs an experiment file or a directory below data/")
        result.update(LOOKS[args.words[0]](find_directories(args.words[1], args.words[2:])))
        return EXIT_OK
    experiment, overrides = args.words[0], args.words[1:]
    config = load_config(experiment, overrides)
    prepare_home()
    check_source(config.data)
    use_servers()
    _start_prefect_server()
    from flows.data import data
    from flows.pipeline import Overrides

    _quiet_expected_errors()
    result.update(data(experiment=experiment, overrides=Overrides(more=overrides)))
    return EXIT_OK


def run_reconciler(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """`gptloom reconcile`: the scheduled flow, started by hand."""
    prepare_home()
    use_servers()
    from tasks.tracking import check_store

    check_store()
    _start_prefect_server()
    from flows.reconcile import reconcile

    result.update(reconcile(apply=args.apply, resume=args.resume))
    for finding in result["findings"]:
        print("{what} {subject}: {problem}; {remedy} ({outcome})".format(**finding), file=sys.stderr)
    if not result["findings"]:
        print("Prefect, MLflow, journals and processes agree; nothing to do", file=sys.stderr)
    return EXIT_OK


def run_doctor(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """`gptloom doctor`: see flows/doctor.py."""
    from flows.doctor import FAIL, examine

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
    load_config(experiment, args.words)
    prepare_home()
    use_servers()
    _start_prefect_server()
    from flows.pipeline import Overrides

    _quiet_expected_errors()
    overrides = Overrides(more=args.words)
    if is_simulation:
        from flows.simulation import simulate_nights

        result.update(simulate_nights(experiment, overrides, args.simulate))
    else:
        from flows.nightly import nightly

        result.update(nightly(experiment, overrides, args.force))
    for night in result.get("nights", [result]):
        shown = (night["night"], night["outcome"], night["champion"] or "-", night["reason"])
        print("night {:>2}  {:<9} champion {:<3} {}".format(*shown), file=sys.stderr)
    return EXIT_OK


def move_champion(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """`gptloom promote` and `gptloom rollback`."""
    prepare_home()
    use_servers()
    _start_prefect_server()
    from flows import registry

    _quiet_expected_errors()
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


def prepare_home() -> Path:
    """GPTLOOM_HOME, made if need be. Raises UserError when it cannot be."""
    home = home_dir()
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"GPTLOOM_HOME={home}: cannot be made ({error.strerror}); point GPTLOOM_HOME at a folder you can write to"
        ) from None
    return home


def use_servers() -> None:
    """Prefect's environment, before its first import: the user's own, else `gptloom up`'s server, else a temporary one."""
    from tasks.tracking import answers, read_servers

    defaults = {
        "GPTLOOM_HOME": str(home_dir()),
        "PREFECT_HOME": str(home_dir() / "prefect"),
        "PREFECT_LOGGING_EXTRA_LOGGERS": "gptcore",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_CLIENT_MAX_RETRIES": "7",  # in all four minutes of patience with a server that is being restarted
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    if theirs := os.environ.get("PREFECT_API_URL"):
        if not answers(f"{theirs}/health"):
            raise UserError(
                f"PREFECT_API_URL={hide_password(theirs)}: no Prefect server answers there; start it, or unset the variable to use a temporary one"
            )
    elif (ours := read_servers().get("prefect_api_url")) and answers(f"{ours}/health"):
        defaults["PREFECT_API_URL"] = str(ours)
    if login := os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):  # what our server asks for, we have to say
        defaults["PREFECT_API_AUTH_STRING"] = login
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _start_prefect_server() -> None:
    """Start Prefect's temporary server, where one is needed, deaf to Ctrl-C: it has to record how the run ended.

    A terminal sends SIGINT to us and to all our children; a blocked signal mask is inherited. Prefect itself ends the server
    at our exit, by SIGTERM, after the last log lines.
    """
    if os.environ.get("PREFECT_API_URL"):
        return
    from prefect.server.api.server import SubprocessASGIServer

    os.environ[MARK_VARIABLE] = mark = uuid.uuid4().hex
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        SubprocessASGIServer().start()  # one per process: Prefect's client finds this one
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        del os.environ[MARK_VARIABLE]
    # If we are killed, nobody else would end that server.
    warden = subprocess.Popen(
        [sys.executable, "-m", "flows.warden", mark],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    _wardens.append(warden)


def _print_results(directory: Path) -> None:
    from gptcore.report import comparison_table, format_comparison, headline

    table = format_comparison(comparison_table(directory)).to_string(index=False)
    print(f"\n{table}\n\n{headline(directory)}\nreport: {directory / 'report.html'}", file=sys.stderr)


# --- up, down ------------------------------------------------------------------------------------------------------------


def start_servers(args: argparse.Namespace, _result: dict[str, Any]) -> int:
    prepare_home()
    from flows import servers

    return servers.up(args.host, args.prefect_port, args.mlflow_port)


def stop_servers(_args: argparse.Namespace, _result: dict[str, Any]) -> int:
    from flows import servers

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


def _quiet_expected_errors() -> None:
    """Keep Prefect's tracebacks of mistakes that we explain in one sentence out of the terminal; its UI still has them."""

    def is_news(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, (UserError, Stopped, NonFinite, DeviceMemoryError))

    for handler in logging.getLogger().handlers:
        handler.addFilter(is_news)


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


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong call also ends in a JSON line on stdout."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        print(f"error: {message}; `{self.prog} --help` explains", file=sys.stderr)
        print(json.dumps({"error": message}))
        raise SystemExit(EXIT_USER)


if __name__ == "__main__":
    raise SystemExit(main())

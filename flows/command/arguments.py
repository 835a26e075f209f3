"""The words of the `gptloom` command: verbs, flags, help. What a verb does is a function in the file of its subject, beside this one."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from gptcore.config import ExperimentConfig
from gptcore.config.switches import STUDIES
from gptcore.errors import EXIT_USER
from gptloom.flows.command.data import work_on_data
from gptloom.flows.command.health import run_doctor, run_reconciler
from gptloom.flows.command.init import init_project
from gptloom.flows.command.nightly import retrain
from gptloom.flows.command.registry import move_champion
from gptloom.flows.command.run import run_experiment, sync_runs
from gptloom.flows.command.servers import start_servers, stop_servers
from gptloom.flows.command.study import run_study

EPILOG = """\
exit codes: 0 done, 2 a mistake in the call or its input, 75 stopped, 76 the loss became infinite, 77 out of memory.
state lives under $GPTLOOM_HOME (default ./.gptloom): data, runs, mlflow.db, prefect."""
AS_WRITTEN = argparse.RawDescriptionHelpFormatter  # lines as they stand here; else argparse fills them up
Verb = Callable[[argparse.Namespace, dict[str, Any]], int | None]


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Raises SystemExit: 0 after help, 2 after a wrong call, which has been explained."""
    if argv[:1] == ["study"]:  # argparse takes no positional words after a flag where none stood before it
        argv = sorted(argv, key=lambda word: word != "study" and not word.startswith("-"))
    return build_parser().parse_args(argv)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gptloom",
        description="From raw text to a trained, evaluated language model: one pipeline, Prefect to run it, MLflow to compare it.",
        epilog=EPILOG,
        formatter_class=AS_WRITTEN,
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def add(name: str, verb: Verb, help_text: str, description: str, **more: Any) -> argparse.ArgumentParser:
        more.setdefault("formatter_class", AS_WRITTEN if "\n" in description else argparse.HelpFormatter)
        added: argparse.ArgumentParser = verbs.add_parser(name, help=help_text, description=description, **more)
        added.set_defaults(verb=verb)
        return added

    run = add(
        "run",
        run_experiment,
        "run an experiment file from text to report",
        "Run the whole pipeline of an experiment file. Finished data steps are found again by their content.\n"
        "Uses the servers of `gptloom up` if they run; otherwise a temporary Prefect server and MLflow in a SQLite file.",
        epilog=f"fields (default in brackets):\n{describe_fields()}\n{EPILOG}",
    )
    run.add_argument("experiment", metavar="EXPERIMENT.yaml", nargs="?", help="experiment file, e.g. experiments/smoke.yaml")
    run.add_argument(
        "--resume", metavar="RUN", help="go on with an interrupted run (its name or MLflow id), with its own settings"
    )
    _add_overrides(run, "change a field, e.g. data.source=my.txt train.max_steps=200")

    init = add(
        "init",
        init_project,
        "lay down a project folder: experiments, deployments, containers",
        "Lay down a project in a new folder or an empty one: experiments, prefect.yaml, docker-compose.yml, Dockerfile.\n"
        "For who installed the package; a checkout is a project already.",
    )
    init.add_argument("directory", metavar="DIR", type=Path, help="the folder; it may hold a .git or .venv, nothing else")

    data = add(
        "data",
        work_on_data,
        "prepare an experiment's text, or look into what was prepared",
        "Source → corpus → vocabulary → shards, without training. stats: sizes, splits, tokens; verify: every byte\n"
        "against its sha256; head: the first records and tokens.",
        usage="gptloom data EXPERIMENT.yaml [section.field=value ...]\n"
        "       gptloom data stats|verify|head EXPERIMENT.yaml|DIR [section.field=value ...]",
    )
    data.add_argument("words", metavar="EXPERIMENT.yaml", nargs="+", help=argparse.SUPPRESS)

    reconcile = add(
        "reconcile",
        run_reconciler,
        "put runs right whose processes died without a word",
        "Match Prefect's flow runs, MLflow's runs, journals, processes and GPUs; say what is wrong. The same runs by\n"
        "schedule while `gptloom up` is up.",
    )
    reconcile.add_argument("--apply", action="store_true", help="put it right; without, nothing is changed")
    reconcile.add_argument("--resume", action="store_true", help="start dead runs again from their last checkpoint")

    doctor = add(
        "doctor",
        run_doctor,
        "look whether all is well with this machine, its servers and its files",
        "One line a check: ok, warn or fail, with the remedy. Exit code 2 when one fails.",
    )
    doctor.add_argument("--full", action="store_true", help="read every byte of checkpoints and shards")

    sync = add(
        "sync",
        sync_runs,
        "bring MLflow up to date with runs that it missed",
        "Replay the journals of these runs (default: all) to MLflow; what is there already stays as it is.",
    )
    sync.add_argument("runs", metavar="RUN", nargs="*", help="name of a run, or its MLflow id")

    study = add(
        "study",
        run_study,
        f"answer a research question: {', '.join(STUDIES)}",
        "Measure every cell of experiments/studies/NAME.yaml and write a report. Cells measured before are kept, so the\n"
        "same command goes on where it was stopped and measures only what changed.",
        epilog=f"study.FIELD=value changes the study file, options.FIELD=value its options, any other the base experiment.\n{EPILOG}",
    )
    study.add_argument("name", metavar="NAME", help=f"{', '.join(STUDIES)}, or a study file (YAML)")
    _add_overrides(study, "e.g. study.seeds=[1,2] train.max_steps=50")
    study.add_argument("--smoke", action="store_true", help="the smallest form, to see that everything works")

    up = add(
        "up",
        start_servers,
        "start Prefect, MLflow and a worker, until Ctrl-C",
        "Start the servers and a worker, register the deployments, print the URLs; Ctrl-C or `gptloom down` stops all of it.",
    )
    up.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    up.add_argument(
        "--no-auth", action="store_true", help="ask for no login: any web page and any local user can then run code as you"
    )
    up.add_argument("--prefect-port", type=int, default=4200, help="port of Prefect (default: %(default)s)")
    up.add_argument("--mlflow-port", type=int, default=5000, help="port of MLflow (default: %(default)s)")

    nightly = add(
        "nightly",
        retrain,
        "train on what is new, promote the better model",
        "One night: read what is new, train a warm and a fresh model on it, promote the better one or say why not.\n"
        "--simulate N: N nights with planted trouble (experiments/nights.yaml), then a rollback.",
        usage="gptloom nightly [EXPERIMENT.yaml] [--simulate N] [--force] [section.field=value ...]",
    )
    nightly.add_argument("words", metavar="EXPERIMENT.yaml", nargs="*", help=argparse.SUPPRESS)
    nightly.add_argument("--simulate", type=int, metavar="N", help="so many nights with planted trouble, at once")
    nightly.add_argument("--force", action="store_true", help="train also when nothing is new")

    for name, text in (("promote", "make a model the champion"), ("rollback", "bring the champion before back")):
        move = add(name, move_champion, text, f"In the registry: {text}.")
        move.add_argument("model", metavar="MODEL", help="NAME, NAME@ALIAS, NAME/VERSION or a run (rollback: NAME)")
        move.add_argument("--reason", default="on request", help="kept with the version (default: %(default)s)")
        move.set_defaults(is_back=name == "rollback")

    add("down", stop_servers, "stop what `gptloom up` started", "Stop the servers and the worker of `gptloom up`.")
    return parser


def _add_overrides(verb: argparse.ArgumentParser, help_text: str) -> None:
    verb.add_argument("overrides", metavar="section.field=value", nargs="*", default=[], help=help_text)


def describe_fields() -> str:
    """Every section.field with default and meaning, from the classes that check them."""
    lines = []
    for section, info in ExperimentConfig.model_fields.items():
        fields = getattr(info.annotation, "model_fields", None)
        if fields is None:
            continue
        lines.append(f"\n  {section}: {(info.annotation.__doc__ or '').strip().splitlines()[0]}")
        for name, field in fields.items():
            head, rest = f"    {section}.{name:<{28 - len(section)}} ", " " * 34
            text = f"{field.description} [{str(field.default).partition('#')[0]}]"
            lines.append(textwrap.fill(text, 116, initial_indent=head, subsequent_indent=rest, break_on_hyphens=False))
    return "\n".join(lines) + "\n"


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong call also ends in a JSON line on stdout."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        print(f"error: {message}; `{self.prog} --help` explains", file=sys.stderr)
        print(json.dumps({"error": message}))
        raise SystemExit(EXIT_USER)

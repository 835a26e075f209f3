"""The words of the `gptloom` command: verbs, flags, help. What a verb does is a function in the file of its subject, beside this one.

from gptloom.flows.command.arguments import parse_arguments
args = parse_arguments(["run", "experiments/smoke.yaml"]); args.verb(args, {})
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import NoReturn

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
    run.add_argument("experiment", metavar="EXPERIMENT.yaml", nargs="?", help="experiment file, e.g. experiments/smoke.yaml")
    run.add_argument(
        "--resume", metavar="RUN", help="go on with an interrupted run (its name or MLflow id), with its own settings"
    )
    _add_overrides(run, "change a field, e.g. data.source=my.txt train.max_steps=200")
    run.set_defaults(verb=run_experiment)

    init = verbs.add_parser(
        "init",
        help="lay down a project folder: experiments, deployments, containers",
        description="Lay down a project in a new folder or an empty one: experiments, prefect.yaml, docker-compose.yml, Dockerfile.\n"
        "For who installed the package; a checkout is a project already.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    init.add_argument("directory", metavar="DIR", type=Path, help="the folder; it may hold a .git or .venv, nothing else")
    init.set_defaults(verb=init_project)

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
    study.add_argument("name", metavar="NAME", help=f"{', '.join(STUDIES)}, or a study file (YAML)")
    _add_overrides(study, "e.g. study.seeds=[1,2] train.max_steps=50")
    study.add_argument("--smoke", action="store_true", help="the smallest form, to see that everything works")
    study.set_defaults(verb=run_study)

    up = verbs.add_parser(
        "up",
        help="start Prefect, MLflow and a worker, until Ctrl-C",
        description="Start the servers and a worker, register the deployments, print the URLs; Ctrl-C or `gptloom down` stops all of it.",
    )
    up.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
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
        move.set_defaults(verb=move_champion, is_back=name == "rollback")

    down = verbs.add_parser(
        "down", help="stop what `gptloom up` started", description="Stop the servers and the worker of `gptloom up`."
    )
    down.set_defaults(verb=stop_servers)
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


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong call also ends in a JSON line on stdout."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        print(f"error: {message}; `{self.prog} --help` explains", file=sys.stderr)
        print(json.dumps({"error": message}))
        raise SystemExit(EXIT_USER)

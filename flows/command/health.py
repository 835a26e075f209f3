"""`gptloom doctor` and `gptloom reconcile`: is all well, and what died without a word put right."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from gptcore.errors import EXIT_OK, EXIT_USER
from gptcore.store import home_dir
from gptloom.flows.command.surroundings import prepare_home, prepare_servers
from gptloom.tasks.records.tracking import check_store


def run_reconciler(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """`gptloom reconcile`: one line a finding on stderr."""
    prepare_home()
    check_store()
    prepare_servers()
    from gptloom.flows.reconcile import reconcile

    result.update(reconcile(apply=args.apply, resume=args.resume))
    for finding in result["findings"]:
        print("{what} {subject}: {problem}; {remedy} ({outcome})".format(**finding), file=sys.stderr)
    if not result["findings"]:
        print("Prefect, MLflow, journals and processes agree; nothing to do", file=sys.stderr)


def run_doctor(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """`gptloom doctor`: every check on stderr as it is made."""
    from gptloom.flows.command.doctor import FAIL, examine

    for check in examine(home_dir(), full=args.full):
        print(check.line(), file=sys.stderr)
        result.setdefault("checks", []).append(asdict(check))
    result["ok"] = all(check["status"] != FAIL for check in result["checks"])
    return EXIT_OK if result["ok"] else EXIT_USER

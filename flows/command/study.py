"""`gptloom study`: a research question, cell by cell."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from gptcore.errors import EXIT_BUG, EXIT_OK, EXIT_STOPPED
from gptloom.flows.command.surroundings import check_source, prepare_servers, quiet_expected_errors

CONTRACT = ("run", "report", "cells", "measured", "cached", "failed", "not_run", "conclusion", "seconds", "mlflow_run_id")


def run_study(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """`gptloom study`: check every cell's config, then the flow. The exit code is 0 once one cell is measured."""
    from gptcore.config.study import find_study, load_study
    from gptcore.studies.engine import check_options

    plan = check_options(load_study(find_study(args.name), args.overrides, smoke=args.smoke))
    check_source(plan.base.data)
    home = prepare_servers()
    from gptloom.flows.run import new_run_name
    from gptloom.flows.study import StudyForm, study

    quiet_expected_errors()
    result["run"] = new_run_name(plan.name)
    print(f"{plan.config.question} {len(plan.cells)} cells, {home / 'runs' / result['run']}", file=sys.stderr)
    flow = study.with_options(flow_run_name=result["run"])
    outcome = flow(name=args.name, smoke=args.smoke, changes=StudyForm(more=args.overrides))
    result.update({key: outcome[key] for key in CONTRACT})
    findings = "".join(f"\n- {finding}" for finding in outcome["findings"])
    print(f"\n{outcome['conclusion']}{findings}\nreport: {outcome['report']}", file=sys.stderr)
    if outcome["measured"] + outcome["cached"] == 0:
        result["error"] = outcome["conclusion"]
        return EXIT_BUG if outcome["failed"] else EXIT_STOPPED
    return EXIT_OK

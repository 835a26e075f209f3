"""`gptloom data`: the data part of the pipeline alone, or a look at its results."""

from __future__ import annotations

import argparse
from typing import Any

from gptcore.config import UserError, load_config
from gptloom.flows.command.surroundings import check_source, find_experiment, prepare_servers, quiet_expected_errors


def work_on_data(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """`gptloom data`: the data part of the pipeline as a flow of its own, or a look at its results."""
    from gptloom.flows.command.look import LOOKS, find_directories

    if args.words[0] in LOOKS:
        if len(args.words) < 2:
            raise UserError(f"gptloom data {args.words[0]} needs an experiment file or a directory below data/")
        result.update(LOOKS[args.words[0]](find_directories(args.words[1], args.words[2:])))
        return
    experiment, overrides = find_experiment(args.words[0]), args.words[1:]
    config = load_config(experiment, overrides)
    check_source(config.data)
    prepare_servers()
    from gptloom.flows.data import data
    from gptloom.flows.forms import Overrides

    quiet_expected_errors()
    result.update(data(experiment=experiment, overrides=Overrides(more=overrides)))

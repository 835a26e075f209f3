"""`gptloom nightly`: one night now, or several simulated ones."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from gptcore.config import UserError, load_config
from gptcore.errors import EXIT_OK, EXIT_USER
from gptloom.flows.command.surroundings import find_experiment, prepare_servers, quiet_expected_errors


def retrain(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """`gptloom nightly`: one night, or several simulated ones."""
    is_simulation = args.simulate is not None
    default = "experiments/nights.yaml" if is_simulation else "experiments/shakespeare.yaml"
    experiment = find_experiment(args.words.pop(0) if args.words and "=" not in args.words[0] else default)
    load_config(experiment, args.words)
    if is_simulation and args.simulate < 1:
        raise UserError(f"--simulate {args.simulate}: there is no night in that; give 1 or more, e.g. --simulate 7")
    prepare_servers()
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

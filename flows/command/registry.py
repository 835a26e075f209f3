"""`gptloom promote` and `gptloom rollback`: which model is in use."""

from __future__ import annotations

import argparse
from typing import Any

from gptcore.errors import EXIT_OK
from gptloom.flows.command.surroundings import prepare_servers, quiet_expected_errors


def move_champion(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """`gptloom promote` and `gptloom rollback`."""
    prepare_servers()
    from gptloom.flows.registry import promote, rollback

    quiet_expected_errors()
    move = rollback if args.is_back else promote
    result.update(move(args.model, args.reason))
    return EXIT_OK

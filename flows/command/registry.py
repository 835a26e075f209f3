"""`gptloom promote` and `gptloom rollback`: which model is in use."""

from __future__ import annotations

import argparse
from typing import Any

from gptcore.config import UserError, hide_password
from gptloom.flows.command.surroundings import prepare_servers, quiet_expected_errors


def move_champion(args: argparse.Namespace, result: dict[str, Any]) -> None:
    for what, text in (("MODEL", args.model), ("--reason", args.reason)):
        if hide_password(text) != text:
            raise UserError(f"{what}: holds a password or token, which would be kept and shown with the model; leave it out")
    prepare_servers()
    from gptloom.flows.registry import promote, rollback

    quiet_expected_errors()
    result.update((rollback if args.is_back else promote)(args.model, args.reason))

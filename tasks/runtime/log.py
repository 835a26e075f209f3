"""Where a task or flow says what it does, and what becomes of it once nobody reads it."""

from __future__ import annotations

import logging
import os
from typing import Any

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from rich.console import Console


def run_logger() -> logging.Logger | logging.LoggerAdapter[Any]:
    """Prefect's logger of the run we are in; a plain one outside of runs."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger("gptloom.tasks")


def outlive_the_reader() -> None:
    """Go on, unheard, when the pipe is gone into which a flow run logs: the worker that held it is dead.

    Prefect logs with rich, which would raise SystemExit in the middle of a training.
    """
    Console.on_broken_pipe = _go_on_unheard  # type: ignore[method-assign, assignment]


def _go_on_unheard(_: Console) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)

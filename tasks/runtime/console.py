"""What a flow run prints once nobody reads it: a worker that dies takes along the pipe that its flow runs log into."""

from __future__ import annotations

import os

from rich.console import Console


def outlive_the_reader() -> None:
    """Go on, unheard, when the pipe is gone. Prefect logs with rich, which would raise SystemExit in the middle of a training."""
    Console.on_broken_pipe = _go_on_unheard  # type: ignore[method-assign, assignment]


def _go_on_unheard(_: Console) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)

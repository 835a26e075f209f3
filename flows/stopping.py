"""How a flow ends that is stopped in its own process, by Ctrl-C or SIGTERM: Cancelled in Prefect, as if it had been cancelled there.

try:
    …
except STOPS as stop:
    return cancelled(stop)
"""

from __future__ import annotations

import os
from typing import Any

from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled

from tasks.liveness import FLOW_RUN_VARIABLE

STOPS = (KeyboardInterrupt, TerminationSignal)  # while a flow runs, Prefect's engine turns SIGTERM into the second


def cancelled(stop: BaseException) -> Any:
    """The state to return from the flow. In a worker's flow-run process SIGTERM is raised on: there it is the word of Prefect's runner,
    which knows what became of the run."""
    if isinstance(stop, TerminationSignal):
        if FLOW_RUN_VARIABLE in os.environ:
            raise stop
        return Cancelled(message="stopped by SIGTERM")
    return Cancelled(message=str(stop) or "stopped by the user")  # a flow called by this one has said why

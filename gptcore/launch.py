"""Several processes of one module on this machine, and one answer for all of them: what torchrun does, with our exit codes.

torch's elastic agent starts them, gives them their ranks and a port of the kernel's choice, and ends the rest when one dies. It is not
asked to start them again: a run goes on from its checkpoint, by whoever started this process (several hosts: use torchrun itself).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterable
from typing import Any

from gptcore.entry import PARENT_VARIABLE, python_environment
from gptcore.errors import EXIT_MEMORY, EXIT_NON_FINITE, EXIT_STOPPED, EXIT_USER

# Of several that failed the cause is told, not those who lost their partner by it.
CAUSES = (EXIT_MEMORY, EXIT_NON_FINITE, EXIT_USER, EXIT_STOPPED)


def launch(module: str, argv: list[str], processes: int) -> int:
    """Run `python -m module *argv` so many times, to the end; 0, or the exit code of the one that failed first.

    Where a signal ended one of them, the same signal ends this process. The first one's result, or the cause of a failure, is
    the last line on stdout.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.update(python_environment() | {PARENT_VARIABLE: str(os.getpid())})  # they end with us
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    with tempfile.TemporaryDirectory(prefix="gptloom-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-u", "-m", module, *argv)
        except SignalException:
            return EXIT_STOPPED  # and what there is to say the first process has said
        except ChildFailedError as error:
            rank, failure = find_cause(error.failures.items())
        else:
            return 0
    if failure.exitcode < 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print(f"process {rank} of {processes} was killed by {failure.signal_name()}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), -failure.exitcode)
    told = failure.error_file_data.get("message") if isinstance(failure.error_file_data, dict) else None
    print(json.dumps({"error": told or f"process {rank} ended with exit code {failure.exitcode}"}), flush=True)
    return int(failure.exitcode)


def find_cause(failures: Iterable[tuple[int, Any]]) -> tuple[int, Any]:
    """(rank, failure): a signal before an exit code, a known exit code before a bug, a bug before SIGTERM (that is how the rest is ended)."""

    def order(item: tuple[int, Any]) -> tuple[int, int]:
        rank, code = item[0], item[1].exitcode
        if code == -signal.SIGTERM:
            return len(CAUSES) + 2, rank
        if code < 0:
            return 0, rank
        return 1 + (CAUSES.index(code) if code in CAUSES else len(CAUSES)), rank

    return min(failures, key=order)

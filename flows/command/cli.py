"""The `gptloom` command. Output for people goes to stderr; the last line on stdout is one JSON object, also after a failure."""

from __future__ import annotations

import json
import sys

if sys.version_info < (3, 11):  # noqa: UP036 - for whoever runs this file with another Python than the installed one
    _message = "gptloom needs Python 3.11 to 3.13, found " + sys.version.split()[0]
    sys.stderr.write("error: " + _message + "\n")
    sys.stdout.write(json.dumps({"error": _message}) + "\n")
    raise SystemExit(2)

import atexit
import contextlib
import gc
import logging
import os
import signal
from collections.abc import Iterator
from typing import Any, NoReturn

from gptcore.entry import python_environment
from gptcore.errors import EXIT_BUG, EXIT_OK, EXIT_STOPPED, describe_error, exit_code
from gptcore.store import keep_private
from gptloom.flows.command.arguments import parse_arguments
from gptloom.flows.command.servers import start_servers, stop_servers


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code: what the verb returns, 0 where it returns none."""
    keep_private()
    os.environ.update(python_environment())  # for what Prefect, MLflow and torch start
    atexit.register(gc.freeze)  # else Python looks for cycles among all it has imported, for a second, before it ends
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    result: dict[str, Any] = {}
    # Verbs that fill `result` have stdout to themselves: whatever else is written there goes to stderr.
    takes_stdout = args.verb not in (start_servers, stop_servers)
    stdout_for_us = _stdout_to_stderr() if takes_stdout else contextlib.nullcontext(sys.stdout)
    with stdout_for_us as stdout, _signals_interrupt():
        try:
            code: int = args.verb(args, result) or EXIT_OK
        except BaseException as error:
            code = _explain(error, result)
        if result:
            stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
            stdout.flush()
    return code


# --- how it ends ---------------------------------------------------------------------------------------------------------


def _explain(error: BaseException, result: dict[str, Any]) -> int:
    """The exit code of what went wrong, with one sentence on stderr; a traceback only for bugs."""
    if isinstance(error, SystemExit):
        raise error
    prefect = sys.modules.get("prefect.exceptions")  # where it is not loaded, it has raised nothing
    if isinstance(error, (KeyboardInterrupt, *((prefect.CancelledRun, prefect.TerminationSignal) if prefect else ()))):
        code, message = EXIT_STOPPED, "stopped on request"
        if prefect and isinstance(error, prefect.CancelledRun):
            message = str(error)  # why, where it was not the user
    else:
        code, message = exit_code(error), describe_error(error)
    if code == EXIT_BUG:
        logging.getLogger("gptloom").error("this is a bug", exc_info=error)
    print(f"error: {message}", file=sys.stderr)
    result["error"] = message
    return code


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[Any]:
    """Nothing but what is written to the yielded stream reaches stdout, not even from child processes."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(saved), "w", encoding="utf-8") as stdout, contextlib.redirect_stdout(sys.stderr):
            yield stdout
    finally:
        os.dup2(saved, 1)
        os.close(saved)


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGINT both end us as Ctrl-C does: children stopped, runs closed, JSON printed.

    SIGINT has to be asked for too: a shell script starts its background jobs with SIGINT ignored, and Python keeps that.
    """

    def interrupt(_number: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    raise SystemExit(main())

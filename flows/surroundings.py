"""What a verb of the `gptloom` command finds around it: the home folder, Prefect's settings, a temporary Prefect server.

from flows.surroundings import prepare_home, start_prefect_server, use_servers
prepare_home(); use_servers(); start_prefect_server()      # in this order, before Prefect's first import
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

from flows.warden import MARK_VARIABLE
from gptcore.config import UserError, hide_password
from gptcore.entry import EXIT_BUG, exit_code
from gptcore.store import home_dir

ROOT = Path(__file__).resolve().parent.parent
_wardens: list[subprocess.Popen[bytes]] = []  # their pipes close when we end


def prepare_home() -> Path:
    """GPTLOOM_HOME, made if need be. Raises UserError when it cannot be."""
    home = home_dir()
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"GPTLOOM_HOME={home}: cannot be made ({error.strerror}); point GPTLOOM_HOME at a folder you can write to"
        ) from None
    return home


def use_servers() -> None:
    """Prefect's environment, before its first import: the user's own, else `gptloom up`'s server, else a temporary one."""
    from tasks.tracking import answers, read_servers

    defaults = {
        "GPTLOOM_HOME": str(home_dir()),
        "PREFECT_HOME": str(home_dir() / "prefect"),
        "PREFECT_LOGGING_EXTRA_LOGGERS": "gptcore",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_CLIENT_MAX_RETRIES": "7",  # in all four minutes of patience with a server that is being restarted
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    if theirs := os.environ.get("PREFECT_API_URL"):
        if not answers(f"{theirs}/health"):
            raise UserError(
                f"PREFECT_API_URL={hide_password(theirs)}: no Prefect server answers there; start it, or unset the variable to use a temporary one"
            )
    elif (ours := read_servers().get("prefect_api_url")) and answers(f"{ours}/health"):
        defaults["PREFECT_API_URL"] = str(ours)
    if login := os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):  # what our server asks for, we have to say
        defaults["PREFECT_API_AUTH_STRING"] = login
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def start_prefect_server() -> None:
    """Start Prefect's temporary server, where one is needed, deaf to Ctrl-C: it has to record how the run ended.

    A terminal sends SIGINT to us and to all our children; a blocked signal mask is inherited. Prefect itself ends the server
    at our exit, by SIGTERM, after the last log lines.
    """
    if os.environ.get("PREFECT_API_URL"):
        return
    from prefect.server.api.server import SubprocessASGIServer

    os.environ[MARK_VARIABLE] = mark = uuid.uuid4().hex
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        SubprocessASGIServer().start()  # one per process: Prefect's client finds this one
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        del os.environ[MARK_VARIABLE]
    # If we are killed, nobody else would end that server.
    warden = subprocess.Popen(
        [sys.executable, "-m", "flows.warden", mark],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    _wardens.append(warden)


def quiet_expected_errors() -> None:
    """Keep Prefect's tracebacks of mistakes that we explain in one sentence out of the terminal; its UI still has them."""

    def is_news(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return error is None or exit_code(error) == EXIT_BUG

    for handler in logging.getLogger().handlers:
        handler.addFilter(is_news)

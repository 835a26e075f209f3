"""What a verb of the `gptloom` command finds around it: the home folder, Prefect's settings, a temporary Prefect server.

from gptloom.flows.command.surroundings import prepare_servers
home = prepare_servers()      # before Prefect's first import
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

from gptcore.config import DataConfig, UserError, hide_password
from gptcore.entry import python_environment
from gptcore.errors import EXIT_BUG, WRITABLE, exit_code
from gptcore.locks import held_beside
from gptcore.store import home_dir, make_home
from gptloom import NO_PROJECT, find_project
from gptloom.flows.servers.databases import PLACES, place_databases, prefect_database
from gptloom.flows.servers.prefect_api import check_login
from gptloom.flows.servers.reaper import MARK_VARIABLE
from gptloom.tasks.records.login import CLIENT_VARIABLE, SERVER_VARIABLE, find_login, take_login
from gptloom.tasks.records.tracking import answers, read_servers

START_S, STOP_S = 120.0, 5.0  # a first start may make a database on a slow disk
_making = contextlib.ExitStack()  # while the first server of a home makes its tables, another one waits
_servers: list[subprocess.Popen[bytes]] = []  # the temporary one, if any
_reapers: list[subprocess.Popen[bytes]] = []  # their pipes close when we end


def check_source(data: DataConfig) -> None:
    """Look at local sources for half a second and say what they will take, so that what is missing, empty or not text is refused
    before anything is started.

    Raises UserError. What must be fetched is looked at by the pipeline, which has retries.
    """
    if not any(":" in source.source.partition("/")[0] for source in data.sources):
        from gptcore.corpus import estimate

        print(f"source: {estimate(data, home_dir())}", file=sys.stderr)


def prepare_home() -> Path:
    """GPTLOOM_HOME, made if need be, with empty databases where it has none. Raises UserError when it cannot be made."""
    home = make_home()
    if not os.access(home, os.W_OK | os.X_OK):
        raise UserError(f"GPTLOOM_HOME={home}: cannot be written to; {WRITABLE}")
    place_databases(home)
    return home


def find_experiment(name: str) -> str:
    """An experiment file as named, else as the project has it. Raises UserError for one that is not here, outside of a project."""
    if Path(name).exists():
        return name
    project = find_project()
    if project is None:
        raise UserError(f"experiment {name}: no such file, and {Path.cwd()} {NO_PROJECT}")
    return str(project / name) if (project / name).is_file() else name


def use_servers() -> None:
    """Prefect's environment, before its first import: the user's own, else `gptloom up`'s server, else a temporary one."""
    defaults = {
        "GPTLOOM_HOME": str(home_dir()),
        "PREFECT_HOME": str(home_dir() / "prefect"),
        "PREFECT_LOGGING_EXTRA_LOGGERS": "gptcore",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_CLIENT_MAX_RETRIES": "7",  # in all four minutes of patience with a server that is being restarted
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    ours = read_servers().get("prefect_api_url")
    if theirs := os.environ.get("PREFECT_API_URL"):
        if not answers(f"{theirs}/health"):
            raise UserError(
                f"PREFECT_API_URL={hide_password(theirs)}: no Prefect server answers there; start it, or unset the variable to use a temporary one"
            )
    elif ours and answers(f"{ours}/health"):
        defaults["PREFECT_API_URL"] = str(ours)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if ours and os.environ.get("PREFECT_API_URL") == ours:
        if login := find_login():  # no other server is told this home's login
            os.environ[CLIENT_VARIABLE] = login
        check_login(ours)
    elif given := os.environ.get(SERVER_VARIABLE):
        os.environ.setdefault(CLIENT_VARIABLE, given)


def prepare_servers() -> Path:
    """GPTLOOM_HOME, Prefect's environment, and a server that answers, as most verbs want it before they import a flow."""
    home = prepare_home()
    use_servers()
    start_prefect_server()
    return home


def launch_prefect_server() -> None:
    """Start Prefect's temporary server, where one is needed, and do not wait for it: its imports take as long as ours.

    After `use_servers`, before Prefect's first import. It has a session of its own, for it has to record how the run ended: a terminal's
    Ctrl-C, or a SIGTERM to our whole group, does not reach it. At our exit it gets SIGTERM, after Prefect's last log lines; if we are
    killed, the reaper ends it.
    """
    if os.environ.get("PREFECT_API_URL"):
        return
    # Two servers that start on one database get in each other's way, also where it has its tables: both write Prefect's block types.
    _making.enter_context(held_beside(home_dir() / PLACES["prefect"], START_S))
    mark = uuid.uuid4().hex
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    login = take_login()
    command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error", "--lifespan", "on"]
    # The marks of Prefect's own temporary server: fewer background services, and no pages for a browser.
    marks = {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1", "PREFECT_UI_ENABLED": "0"}
    # It runs code for whoever reaches it: no web page and no other user of this machine may.
    guard = {SERVER_VARIABLE: login, "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port}"}
    # uvicorn puts its working folder before all others to import from: not the user's.
    environment = python_environment() | prefect_database(home_dir()) | marks | guard | {MARK_VARIABLE: mark}
    server = subprocess.Popen(command, env=environment, cwd=home_dir(), start_new_session=True)
    _servers.append(server)
    reaper = subprocess.Popen(
        [sys.executable, "-m", "gptloom.flows.servers.reaper", mark],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=python_environment(),
        start_new_session=True,
    )
    _reapers.append(reaper)
    atexit.register(_stop_prefect_server)  # what is registered first, before Prefect's own, runs last
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    os.environ[CLIENT_VARIABLE] = login
    os.environ["PREFECT_UI_URL"] = ""  # else Prefect prints links to pages that this server does not have


def start_prefect_server() -> None:
    """Wait until the temporary server answers, where there is one. Raises UserError when it does not come up."""
    launch_prefect_server()
    deadline = time.monotonic() + START_S
    for server in _servers:
        while not answers(f"{os.environ['PREFECT_API_URL']}/health"):
            if server.poll() is not None or time.monotonic() > deadline:
                how = "did not answer in time" if server.returncode is None else f"ended with code {server.returncode}"
                raise UserError(
                    f"Prefect's temporary server {how} (above is what it said); try again, or start servers with `gptloom up`"
                )
            time.sleep(0.05)
    _making.close()


def _stop_prefect_server() -> None:
    for server in _servers:
        server.terminate()
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()


def quiet_expected_errors() -> None:
    """Keep Prefect's tracebacks of mistakes that we explain in one sentence out of the terminal; its UI still has them."""

    def is_news(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return error is None or exit_code(error) == EXIT_BUG

    for handler in logging.getLogger().handlers:
        handler.addFilter(is_news)

"""`gptloom up` and `gptloom down`: Prefect server, MLflow server and workers on this machine, started and stopped as one.

    gptloom up        # stays in the foreground; Ctrl-C stops everything
    gptloom down      # the same from another terminal

What is up is written to $GPTLOOM_HOME/servers.json once all of it is healthy: {"prefect_api_url", "mlflow_url", "pid",
"pids"}. Whoever holds the lock $GPTLOOM_HOME/servers/up.lock is the `up` of this home; its process id stands in it. Each
process logs to $GPTLOOM_HOME/servers/NAME.log. All children are started from the main thread, each in a session of
its own (Ctrl-C must not reach them before their flow runs are cancelled); flows/servers/reaper.py ends them if `up` is killed.
A server or worker that ends by itself is started again: runs go on meanwhile, and their records wait for it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

from gptcore.config import UserError
from gptcore.entry import python_environment
from gptcore.locks import held_beside, read_holder, sign_lock, try_lock
from gptcore.store import home_dir, write_json
from gptloom import NO_PROJECT, PACKAGE, find_project, is_checkout
from gptloom.flows.servers.databases import PLACES, prefect_database
from gptloom.flows.servers.listening import check_host, check_port, is_loopback
from gptloom.flows.servers.pools import POOLS, prepare_pool
from gptloom.flows.servers.prefect_api import answers, cancel_flow_runs, request, wait_for
from gptloom.flows.servers.reaper import MARK_VARIABLE
from gptloom.tasks.records.guard import ENTER, HOSTS_VARIABLE, MLFLOW_APP
from gptloom.tasks.records.login import FILE_NAME as LOGIN_FILE
from gptloom.tasks.records.login import SERVER_VARIABLE, VARIABLES, client_environment, take_login
from gptloom.tasks.records.tracking import SERVERS_FILE, UP_LOCK, mlflow_database

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"

HEALTHY_S = 120.0  # a first start makes both databases; slow disks need a minute
COMMAND_S = 120.0
CANCEL_S = 30.0  # Prefect's own grace for a flow run
WORKER_S = 10.0
SERVER_S = 10.0
DOWN_S = CANCEL_S + 60.0
MAX_RESTARTS, RESTART_WINDOW_S = (3, 600.0)  # a server that ends more often than so has a reason that starting it will not mend


class _StopRequested(Exception):
    """Ctrl-C, SIGTERM or a closed terminal."""


class _StartFailed(Exception):
    """A server or worker did not come up, or ended by itself; the message holds its log's last lines."""


def up(host: str = LOOPBACK, prefect_port: int = 4200, mlflow_port: int = 5000, asks_login: bool = True) -> int:
    """Start everything, stay until stopped. Returns 0 when stopped on request, 1 when something failed.

    Raises UserError for a host that would expose an unprotected server, a port in use, another checkout's folder, or a second `up` for this
    home.
    """
    _log_to_stderr()
    check_host(host, asks_login=asks_login)
    if prefect_port == mlflow_port:
        raise UserError(f"--prefect-port and --mlflow-port are both {prefect_port}; choose two")
    project = find_project()
    if project is None:
        raise UserError(f"{Path.cwd()} {NO_PROJECT}")
    if is_checkout(project) and not project.samefile(PACKAGE.parent):
        raise UserError(
            f"{project} is another checkout of gptloom than the one that is installed here ({PACKAGE.parent}): its flow runs would mix "
            "both; start it with its own .venv/bin/gptloom, or call this from another folder"
        )
    home = home_dir()
    lock = _take_lock(home)
    (home / SERVERS_FILE).unlink(missing_ok=True)  # of one that was killed
    try:
        check_port(host, prefect_port, "Prefect", "--prefect-port")
        check_port(LOOPBACK, mlflow_port, "MLflow", "--mlflow-port")
        if asks_login and not entry_points(group="mlflow.app", name=MLFLOW_APP):
            raise UserError("gptloom was installed before its code was renewed; install it again (in a checkout: make up)")
        login = take_login() if asks_login else None
        if login is not None:  # for what this process itself asks Prefect
            os.environ.update(client_environment(login))
        return _Stack(home, project, host, prefect_port, mlflow_port, login).run()
    finally:
        os.close(lock)


def down() -> int:
    """Stop the `up` of this home and wait until it is gone; prints one JSON object. Returns 0 also when none runs."""
    print(json.dumps(stop()), flush=True)
    return 0


def stop() -> dict[str, Any]:
    """What `down` does, without printing: {"stopped": was one running, "pid": its process id or None, "home"}."""
    _log_to_stderr()
    home = home_dir()
    pid = read_holder(_lock_file(home))
    if pid is None:
        log.info("nothing to stop: no `gptloom up` runs for %s", home)
    else:
        log.info("stopping `gptloom up` (process %d); running flow runs get %.0f s", pid, CANCEL_S)
        os.kill(pid, signal.SIGTERM)
        if not wait_for(lambda: read_holder(_lock_file(home)) is None, DOWN_S):
            log.error("process %d did not stop within %.0f s; it is killed now", pid, DOWN_S)
            os.kill(pid, signal.SIGKILL)  # flows/servers/reaper.py ends the rest
            wait_for(lambda: read_holder(_lock_file(home)) is None, 10.0)
        log.info("stopped")
    (home / SERVERS_FILE).unlink(missing_ok=True)
    return {"stopped": pid is not None, "pid": pid, "home": str(home)}


class _Stack:
    """The processes of one `up`, in the order they start."""

    def __init__(self, home: Path, project: Path, host: str, prefect_port: int, mlflow_port: int, login: str | None) -> None:
        self.home = home
        self.login = login
        self.project = project
        self.logs = home / "servers"
        self.host = host
        self.ports = (prefect_port, mlflow_port)
        local = LOOPBACK if host in ("0.0.0.0", "::") else host
        self.prefect_url = f"http://{f'[{local}]' if ':' in local else local}:{prefect_port}"
        self.mlflow_url = f"http://{LOOPBACK}:{mlflow_port}"
        self.pools = ["cpu", "gpu"] if _has_gpu() else ["cpu"]
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.mark = uuid.uuid4().hex
        self.began = datetime.now(UTC)
        self.reaper: subprocess.Popen[str] | None = None
        self.arguments: dict[str, tuple[str, ...]] = {}
        self.restarts: dict[str, list[float]] = {}

    def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _request_stop)
        try:
            self._start()
            self._announce()
            self._watch()
        except _StopRequested:
            log.info("stopping: running flow runs get %.0f s; a second Ctrl-C stops at once", CANCEL_S)
            return 0
        except _StartFailed as error:
            log.error("%s", error)
            return 1
        finally:
            self._stop()

    def _start(self) -> None:
        self.home.joinpath("mlartifacts").mkdir(parents=True, exist_ok=True)
        log.info("starting Prefect and MLflow for %s", self.home)
        self.reaper = subprocess.Popen(
            [sys.executable, "-m", "gptloom.flows.servers.reaper", self.mark],
            stdin=subprocess.PIPE,
            text=True,
            env=python_environment(),
            start_new_session=True,
        )
        # A verb that starts on the same new home waits for the tables.
        with ExitStack() as making:
            for place in PLACES.values():
                making.enter_context(held_beside(self.home / place, HEALTHY_S))
            self._start_servers()
        self._start_workers()

    def _start_servers(self) -> None:
        prefect_port, mlflow_port = self.ports
        self._spawn("prefect", "-m", "prefect", "server", "start", "--host", self.host, "--port", str(prefect_port))
        self._spawn(
            "mlflow",
            "-m",
            "mlflow",
            "server",
            "--host",
            LOOPBACK,
            "--port",
            str(mlflow_port),
            "--workers",
            "1",
            "--backend-store-uri",
            mlflow_database(self.home),
            "--artifacts-destination",
            str(self.home / "mlartifacts"),
            "--uvicorn-opts",
            "--log-level warning",
            *(("--app-name", MLFLOW_APP) if self.login else ()),
        )
        self._wait_until(lambda: answers(f"{self.prefect_url}/api/health"), "prefect")
        self._wait_until(lambda: answers(f"{self.mlflow_url}/health"), "mlflow")

    def _start_workers(self) -> None:
        log.info("registering the deployments of prefect.yaml")
        # Both pools always: a deployment needs its pool, and a GPU may be added later.
        try:
            for pool in POOLS:
                prepare_pool(f"{self.prefect_url}/api", pool, has_worker=pool in self.pools)
        except OSError as error:
            raise _StartFailed(f"the work pools cannot be made ({error})\n{self._tail('prefect')}") from error
        for pool in self.pools:
            self._spawn(
                f"worker-{pool}",
                "-m",
                "prefect",
                "worker",
                "start",
                "--pool",
                pool,
                "--type",
                "process",
                "--name",
                f"{pool}-{socket.gethostname()}",
            )
        self._command("deploy", "--no-prompt", "deploy", "--all", "--prefect-file", str(self.project / "prefect.yaml"))
        for pool in self.pools:
            self._wait_until(lambda pool=pool: self._worker_is_online(pool), f"worker-{pool}")  # type: ignore[misc]

    def _write_state(self) -> None:
        pids = {name: child.pid for name, child in self.children.items()}
        write_json(
            self.home / SERVERS_FILE,
            {
                "prefect_api_url": f"{self.prefect_url}/api",
                "mlflow_url": self.mlflow_url,
                "prefect_ui_url": self.prefect_url,
                "pid": os.getpid(),
                "pids": pids,
                "pools": self.pools,
            },
        )

    def _announce(self) -> None:
        self._write_state()
        print(f"Prefect  {self.prefect_url}   start runs: Deployments, then Run; the nightly schedule is on")
        print(f"MLflow   {self.mlflow_url}   every run's numbers and files")
        print(f"workers  {', '.join(self.pools)}   logs: {self.logs}")
        self._announce_login()
        for pool in POOLS:
            if pool not in self.pools:
                print(f"pool {pool}: no worker, since no NVIDIA GPU was found here; what is sent to it waits")
        print("`gptloom run` in another terminal uses these servers. Ctrl-C here, or `gptloom down`, stops them.", flush=True)
        if not is_loopback(self.host):
            log.warning("MLflow stays on %s; reach it through an SSH tunnel", LOOPBACK)

    def _announce_login(self) -> None:
        """The login for the browser: on a terminal itself, for a log where it stands."""
        if self.login is None:
            log.warning(
                "--no-auth: any web page that is open in a browser here, and any user of this machine, can run code as you"
            )
        elif os.environ.get(SERVER_VARIABLE):
            print(f"login    the value of {SERVER_VARIABLE}, for both")
        elif sys.stdout.isatty():
            print(f"login    Prefect's page asks once for: {self.login}")
            user, _, password = self.login.partition(":")
            print(
                f"         MLflow's page with it: http://{quote(user, safe='')}:{quote(password, safe='')}@{self.mlflow_url.removeprefix('http://')}{ENTER}"
            )
        else:
            print(f"login    both pages ask for it; it stands in {self.home / LOGIN_FILE}")

    def _watch(self) -> NoReturn:
        while True:
            for name, child in list(self.children.items()):
                if child.poll() is not None:
                    self._restart(name, child.returncode)
            time.sleep(0.5)

    def _restart(self, name: str, code: int) -> None:
        """Start a server or worker again that ended by itself, unless it does so all the time."""
        now = time.monotonic()
        recent = [at for at in self.restarts.get(name, []) if now - at < RESTART_WINDOW_S]
        if len(recent) >= MAX_RESTARTS:
            self._check_children()
        log.warning("%s ended by itself (exit code %s); it is started again\n%s", name, code, self._tail(name))
        self.restarts[name] = [*recent, now]
        with contextlib.suppress(ProcessLookupError):  # a child of its own may still hold the port
            os.killpg(self.children[name].pid, signal.SIGKILL)
        self._log_path(name).replace(self._log_path(f"{name}.before"))
        self._spawn(name, *self.arguments[name])
        self._write_state()

    def _check_children(self) -> None:
        for name, child in self.children.items():
            if child.poll() is not None:
                raise _StartFailed(f"{name} ended by itself (exit code {child.returncode})\n{self._tail(name)}")

    def _stop(self) -> None:
        try:
            (self.home / SERVERS_FILE).unlink(missing_ok=True)
            if any(name.startswith("worker-") for name in self.children):
                cancel_flow_runs(self.prefect_url, self.pools, CANCEL_S)
            self._terminate([n for n in self.children if n.startswith("worker-")], WORKER_S)
            self._terminate([n for n in self.children if not n.startswith("worker-")], SERVER_S)
        except _StopRequested:
            log.warning("stopping at once")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if self.reaper is not None and self.reaper.stdin is not None:
            self.reaper.stdin.close()  # it ends whatever is left, then itself
            self.reaper.wait()
        for child in self.children.values():
            child.wait()
        log.info("all processes ended")

    def _terminate(self, names: list[str], seconds: float) -> None:
        for name in names:
            _signal_group(self.children[name], signal.SIGTERM)
        wait_for(lambda: all(self.children[name].poll() is not None for name in names), seconds)

    def _spawn(self, name: str, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[bytes]:
        assert self.reaper is not None
        assert self.reaper.stdin is not None
        with open(self._log_path(name), "ab" if name in self.children else "wb") as output:
            child = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd or self.logs,  # not the user's folder: uvicorn imports from where it is started
                env=self._environment(),
                start_new_session=True,
            )
        self.children[name], self.arguments[name] = child, arguments
        self.reaper.stdin.write(f"{child.pid}\n")
        self.reaper.stdin.flush()
        return child

    def _command(self, name: str, *arguments: str) -> None:
        """A `prefect` command that ends; its output is its log. It imports from where it is started: our own code, or where none lies."""
        folder = self.project if is_checkout(self.project) else self.project / "experiments"
        child = self._spawn(name, "-m", "prefect", *arguments, cwd=folder)
        del self.children[name]
        deadline = time.monotonic() + COMMAND_S
        while child.poll() is None and time.monotonic() < deadline:
            self._check_children()
            time.sleep(0.1)
        if child.poll() != 0:
            reason = "took too long" if child.returncode is None else f"failed (exit code {child.returncode})"
            raise _StartFailed(f"prefect {' '.join(arguments)} {reason}\n{self._tail(name)}")

    def _environment(self) -> dict[str, str]:
        env = child_environment(self.home, self.project, self.prefect_url, self.mlflow_url, self.login)
        env[MARK_VARIABLE] = self.mark
        if not is_loopback(self.host):  # what a browser elsewhere calls
            name = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
            env["PREFECT_SERVER_UI_API_URL"] = f"http://{name}:{self.ports[0]}/api"
            env["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] += f",http://{name}:{self.ports[0]}"
        return env

    def _wait_until(self, condition: Callable[[], bool], name: str) -> None:
        deadline = time.monotonic() + HEALTHY_S
        while not condition():
            self._check_children()
            if time.monotonic() > deadline:
                raise _StartFailed(f"{name} did not answer within {HEALTHY_S:.0f} s\n{self._tail(name)}")
            time.sleep(0.2)

    def _worker_is_online(self, pool: str) -> bool:
        try:
            workers = request(f"{self.prefect_url}/api/work_pools/{pool}/workers/filter", {}) or []
        except OSError:
            return False
        # A worker of an earlier `up` counts as online for a while after its end.
        return any(datetime.fromisoformat(worker["last_heartbeat_time"]) >= self.began for worker in workers)

    def _log_path(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def _tail(self, name: str) -> str:
        lines = self._log_path(name).read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        return "\n".join([f"the end of {self._log_path(name)}:", *(f"  {line}" for line in lines)])


def child_environment(home: Path, project: Path, prefect_url: str, mlflow_url: str, login: str | None) -> dict[str, str]:
    """What servers, workers and through them flow runs find in their environment. login: None where nobody is asked for one."""
    env = {key: value for key, value in python_environment().items() if key not in ("PREFECT_PROFILE", *VARIABLES)}
    port = prefect_url.rpartition(":")[2]
    env |= {
        "GPTLOOM_HOME": str(home),
        "GPTLOOM_ROOT": str(project),  # prefect.yaml's pull step
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_API_URL": f"{prefect_url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # Without this, any page open in the browser could start flow runs here.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{prefect_url},http://localhost:{port}",
        "PREFECT_CLIENT_MAX_RETRIES": "7",  # in all four minutes of patience with a server that is being restarted
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # Prefect's smallest: a dead run is noticed soon
        "MLFLOW_TRACKING_URI": mlflow_url,
        HOSTS_VARIABLE: ",".join(f"{host}:{mlflow_url.rpartition(':')[2]}" for host in (LOOPBACK, "localhost", "[::1]")),
        **prefect_database(home),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight helper processes, 2 GB, for features not used here
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
    }
    for name in ("NO_PROXY", "no_proxy"):
        env[name] = ",".join(filter(None, [env.get(name), "127.0.0.1", "localhost"]))
    if login is not None:
        env |= {SERVER_VARIABLE: login} | client_environment(login)
    return env


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


def _has_gpu() -> bool:
    """An NVIDIA GPU that the driver answers for; torch is not imported to know it."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and listing.stdout.startswith("GPU ")


def _lock_file(home: Path) -> Path:
    return home / UP_LOCK


def _take_lock(home: Path) -> int:
    """The lock of this home with our process id in it; it falls when the process ends."""
    path = _lock_file(home)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    if not try_lock(lock):
        os.close(lock)
        raise UserError(f"`gptloom up` already runs for {home} (process {read_holder(path)}); stop it with `gptloom down`")
    sign_lock(lock)
    return lock


def _signal_group(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)


def _request_stop(number: int, frame: object) -> None:
    raise _StopRequested

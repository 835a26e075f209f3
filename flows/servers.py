"""`gptloom up` and `gptloom down`: Prefect server, MLflow server and workers on this machine, started and stopped as one.

    gptloom up        # stays in the foreground; Ctrl-C stops everything
    gptloom down      # the same from another terminal

What is up is written to $GPTLOOM_HOME/servers.json once all of it is healthy: {"prefect_api_url", "mlflow_url", "pid",
"pids"}. Whoever holds the lock $GPTLOOM_HOME/servers/up.lock is the `up` of this home; its process id stands in it. Each
process logs to $GPTLOOM_HOME/servers/NAME.log. All children are started from the main thread, each in a session of
its own (Ctrl-C must not reach them before their flow runs are cancelled); flows/warden.py ends them if `up` is killed.
"""

from __future__ import annotations

import base64
import fcntl
import ipaddress
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from gptcore.config import UserError
from gptcore.store import home_dir, write_json

from flows.warden import MARK_VARIABLE

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent  # the checkout: prefect.yaml, experiments/
STATE_FILE = "servers.json"
LOCK_FILE = "up.lock"
AUTH_VARIABLE = "PREFECT_SERVER_API_AUTH_STRING"
LOOPBACK = "127.0.0.1"

HEALTHY_S = 120.0  # a first start makes both databases; slow disks need a minute
COMMAND_S = 120.0
CANCEL_S = 30.0  # Prefect's own grace for a flow run
WORKER_S = 10.0
SERVER_S = 10.0
DOWN_S = CANCEL_S + 60.0


class _StopRequested(Exception):
    """Ctrl-C, SIGTERM or a closed terminal."""


class _StartFailed(Exception):
    """A server or worker did not come up, or ended by itself; the message holds its log's last lines."""


def up(host: str = LOOPBACK, prefect_port: int = 4200, mlflow_port: int = 5000) -> int:
    """Start everything, stay until stopped. Returns 0 when stopped on request, 1 when something failed.

    Raises UserError for a host that would expose an unprotected server, a port in use, or a second `up` for this home.
    """
    _check_host(host)
    if not (ROOT / "prefect.yaml").is_file():
        raise UserError(f"{ROOT / 'prefect.yaml'}: not found; `gptloom up` needs a checkout installed with pip install -e")
    home = home_dir()
    lock = _take_lock(home)
    try:
        _check_port(host, prefect_port, "Prefect", "--prefect-port")
        _check_port(LOOPBACK, mlflow_port, "MLflow", "--mlflow-port")
        return _Stack(home, host, prefect_port, mlflow_port).run()
    finally:
        lock.close()


def down() -> int:
    """Stop the `up` of this home and wait until it is gone; prints one JSON object. Returns 0 also when none runs."""
    home = home_dir()
    pid = _lock_holder(home)
    if pid is None:
        (home / STATE_FILE).unlink(missing_ok=True)
        log.info("nothing to stop: no `gptloom up` runs for %s", home)
        print(json.dumps({"stopped": False, "home": str(home)}), flush=True)
        return 0
    log.info("stopping `gptloom up` (process %d); running flow runs get %.0f s", pid, CANCEL_S)
    os.kill(pid, signal.SIGTERM)
    if not _wait_for(lambda: _lock_holder(home) is None, DOWN_S):
        log.error("process %d did not stop within %.0f s; it is killed now", pid, DOWN_S)
        os.kill(pid, signal.SIGKILL)  # flows/warden.py ends the rest
        _wait_for(lambda: _lock_holder(home) is None, 10.0)
    (home / STATE_FILE).unlink(missing_ok=True)
    log.info("stopped")
    print(json.dumps({"stopped": True, "pid": pid, "home": str(home)}), flush=True)
    return 0


class _Stack:
    """The processes of one `up`, in the order they start."""

    def __init__(self, home: Path, host: str, prefect_port: int, mlflow_port: int) -> None:
        self.home = home
        self.logs = home / "servers"
        self.host = host
        self.ports = (prefect_port, mlflow_port)
        local = LOOPBACK if host in ("0.0.0.0", "::") else host
        self.prefect_url = f"http://{f'[{local}]' if ':' in local else local}:{prefect_port}"
        self.mlflow_url = f"http://{LOOPBACK}:{mlflow_port}"
        self.pools = ["cpu", "gpu"] if _has_gpu() else ["cpu"]
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.mark = uuid.uuid4().hex
        self.warden: subprocess.Popen[str] | None = None

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
        self.warden = subprocess.Popen(
            [sys.executable, "-m", "flows.warden", self.mark], stdin=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
        )  # fmt: skip
        prefect_port, mlflow_port = self.ports
        self._spawn("prefect", "-m", "prefect", "server", "start", "--host", self.host, "--port", str(prefect_port))
        self._spawn(
            "mlflow", "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(mlflow_port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.home}/mlflow.db",
            "--artifacts-destination", str(self.home / "mlartifacts"), "--uvicorn-opts", "--log-level warning",
        )  # fmt: skip
        self._wait_until(lambda: _answers(f"{self.prefect_url}/api/health"), "prefect")
        self._wait_until(lambda: _answers(f"{self.mlflow_url}/health"), "mlflow")
        log.info("registering the deployments of prefect.yaml")
        # Both pools always: a deployment needs its pool, and a GPU may be added later.
        for pool in ("cpu", "gpu"):
            if not _answers(f"{self.prefect_url}/api/work_pools/{pool}"):
                self._command(f"pool-{pool}", "work-pool", "create", pool, "--type", "process")
        for pool in self.pools:
            self._spawn(
                f"worker-{pool}", "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process",
                "--name", f"{pool}-{socket.gethostname()}",
            )  # fmt: skip
        self._command("deploy", "--no-prompt", "deploy", "--all")
        for pool in self.pools:
            self._wait_until(lambda pool=pool: self._worker_is_online(pool), f"worker-{pool}")  # type: ignore[misc]

    def _announce(self) -> None:
        pids = {name: child.pid for name, child in self.children.items()}
        write_json(
            self.home / STATE_FILE,
            {
                "prefect_api_url": f"{self.prefect_url}/api",
                "mlflow_url": self.mlflow_url,
                "prefect_ui_url": self.prefect_url,
                "pid": os.getpid(),
                "pids": pids,
                "pools": self.pools,
            },
        )
        print(f"Prefect  {self.prefect_url}   start runs: Deployments, then Run; the nightly schedule is on")
        print(f"MLflow   {self.mlflow_url}   every run's numbers and files")
        print(f"workers  {', '.join(self.pools)}   logs: {self.logs}")
        print("`gptloom run` in another terminal uses these servers. Ctrl-C here, or `gptloom down`, stops them.", flush=True)
        if not _is_loopback(self.host):
            log.warning("MLflow has no login and stays on %s; reach it through an SSH tunnel", LOOPBACK)

    def _watch(self) -> None:
        while True:
            self._check_children()
            time.sleep(0.5)

    def _check_children(self) -> None:
        for name, child in self.children.items():
            if child.poll() is not None:
                raise _StartFailed(f"{name} ended by itself (exit code {child.returncode})\n{self._tail(name)}")

    def _stop(self) -> None:
        (self.home / STATE_FILE).unlink(missing_ok=True)
        try:
            if any(name.startswith("worker-") for name in self.children):
                _cancel_flow_runs(self.prefect_url, self.pools)
            self._terminate([n for n in self.children if n.startswith("worker-")], WORKER_S)
            self._terminate([n for n in self.children if not n.startswith("worker-")], SERVER_S)
        except _StopRequested:
            log.warning("stopping at once")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if self.warden is not None and self.warden.stdin is not None:
            self.warden.stdin.close()  # it ends whatever is left, then itself
            self.warden.wait()
        for child in self.children.values():
            child.wait()
        log.info("all processes ended")

    def _terminate(self, names: list[str], seconds: float) -> None:
        for name in names:
            _signal_group(self.children[name], signal.SIGTERM)
        _wait_for(lambda: all(self.children[name].poll() is not None for name in names), seconds)

    def _spawn(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        assert self.warden is not None and self.warden.stdin is not None
        with open(self._log_path(name), "wb") as output:
            child = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                cwd=ROOT, env=self._environment(), start_new_session=True,
            )  # fmt: skip
        self.children[name] = child
        self.warden.stdin.write(f"{child.pid}\n")
        self.warden.stdin.flush()
        return child

    def _command(self, name: str, *arguments: str) -> None:
        """A `prefect` command that ends; its output is its log."""
        child = self._spawn(name, "-m", "prefect", *arguments)
        del self.children[name]
        deadline = time.monotonic() + COMMAND_S
        while child.poll() is None and time.monotonic() < deadline:
            self._check_children()
            time.sleep(0.1)
        if child.poll() != 0:
            reason = "took too long" if child.returncode is None else f"failed (exit code {child.returncode})"
            raise _StartFailed(f"prefect {' '.join(arguments)} {reason}\n{self._tail(name)}")

    def _environment(self) -> dict[str, str]:
        address = urllib.request.urlparse(self.prefect_url) if False else self.prefect_url
        return address  # type: ignore[return-value]

    def _wait_until(self, condition: Callable[[], bool], name: str) -> None:
        deadline = time.monotonic() + HEALTHY_S
        while not condition():
            self._check_children()
            if time.monotonic() > deadline:
                raise _StartFailed(f"{name} did not answer within {HEALTHY_S:.0f} s\n{self._tail(name)}")
            time.sleep(0.2)

    def _worker_is_online(self, pool: str) -> bool:
        workers = _api(f"{self.prefect_url}/api/work_pools/{pool}/workers/filter", {}) or []
        return any(worker["status"] == "ONLINE" for worker in workers)

    def _log_path(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def _tail(self, name: str) -> str:
        lines = self._log_path(name).read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        return "\n".join([f"the end of {self._log_path(name)}:", *(f"  {line}" for line in lines)])

"""Prefect's REST API for the few calls `gptloom up` makes: a GET costs milliseconds, importing Prefect costs seconds.

python -c "from gptloom.flows.servers.prefect_api import request; print(request('http://127.0.0.1:4200/api/health'))"
"""

from __future__ import annotations

import base64
import json
import logging
import os
import time
import urllib.request
from collections.abc import Callable
from http import HTTPStatus
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

from gptcore.config import UserError
from gptloom.tasks.records.login import CLIENT_VARIABLE, SERVER_VARIABLE

log = logging.getLogger(__name__)

BUSY_S, BUSY_PAUSE_S = 30.0, 0.5


def request(url: str, body: dict[str, Any] | None = None, method: str | None = None, *, patience_s: float = BUSY_S) -> Any:
    """GET, or POST with a body, or what `method` says, with the login of Prefect's clients (PREFECT_API_AUTH_STRING).

    patience_s: how long a server is asked again that answers 503, as Prefect's does while its SQLite file is locked; it has done nothing then.
    Raises OSError (urllib's errors are) when the server does not answer with success.
    """
    headers = {"Content-Type": "application/json"}
    if auth := os.environ.get(CLIENT_VARIABLE):
        headers["Authorization"] = "Basic " + base64.b64encode(auth.encode()).decode()
    message = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers, method=method)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through the user's proxy
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with direct.open(message, timeout=10) as response:
                text = response.read()
            break
        except HTTPError as error:
            if error.code != HTTPStatus.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                raise
            time.sleep(BUSY_PAUSE_S)
    return json.loads(text) if text.startswith((b"{", b"[")) else None


def answers(url: str) -> bool:
    """Does a server answer here with success, now?"""
    try:
        request(url, patience_s=0)
    except (OSError, HTTPException):  # HTTPException: something listens there that does not speak HTTP
        return False
    return True


def exists(url: str) -> bool:
    """Is there what this URL names? Raises OSError when the server does not say."""
    try:
        request(url)
    except HTTPError as error:
        if error.code != HTTPStatus.NOT_FOUND:
            raise
        return False
    return True


def check_login(api: str) -> None:
    """Raises UserError when our server at `api` refuses the login that we say; what else is wrong with it others will find."""
    try:
        request(f"{api}/version")
    except HTTPError as error:
        if error.code == 401:
            raise UserError(
                f"Prefect at {api} refuses this home's login; set {SERVER_VARIABLE} as it was for `gptloom up`, or start that again"
            ) from None
    except (OSError, HTTPException):
        pass


def cancel_flow_runs(prefect_url: str, pools: list[str], seconds: float) -> None:
    """Cancel what our workers run and wait for it, at most so many seconds; a server that does not answer is only reported."""
    api = f"{prefect_url}/api/flow_runs"
    active = {"flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}}

    def ours() -> list[dict[str, Any]]:
        return [run for run in request(f"{api}/filter", active) or [] if run["work_pool_name"] in pools]

    try:
        for run in request(f"{api}/filter", active) or []:
            if run["work_pool_name"] in pools:
                log.info("cancelling flow run %s", run["name"])
                request(f"{api}/{run['id']}/set_state", {"state": {"type": "CANCELLING", "message": "gptloom down"}})
            elif run["parent_task_run_id"] is None:
                log.warning("flow run %s was not started by a worker here; it goes on without its servers", run["name"])
        if not wait_for(lambda: not ours(), seconds):
            log.warning("still running after %.0f s, killed now: %s", seconds, ", ".join(run["name"] for run in ours()))
    except OSError as error:
        log.warning("Prefect does not answer (%s); flow runs are ended without being cancelled first", error)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Ask five times a second until it is true; False when the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True

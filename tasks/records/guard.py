"""MLflow's server behind a login: the app that `mlflow server --app-name gptloom` serves.

The login is that of MLflow's clients, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the server's environment.
MLflow's own app for this (`basic-auth`) would bring a database of users, another package (Flask-WTF) and another secret, for one user.
"""

from __future__ import annotations

import base64
import hmac
import json
import os
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from fnmatch import fnmatchcase
from typing import Any

from gptloom.tasks.records.login import MLFLOW_VARIABLES

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Callable[[], Awaitable[Message]], Send], Awaitable[None]]

MLFLOW_APP = "gptloom"  # as pyproject.toml names it
HOSTS_VARIABLE = (
    "MLFLOW_SERVER_ALLOWED_HOSTS"  # MLflow's own, which takes patterns, but no foreign name may even be asked for the login
)
ENTER = "/login"  # the page of the link that `gptloom up` prints


class Guard:
    """An ASGI app that lets nobody pass to another one but who says the login, from a page of this server or from no page at all.

    Open is the health check alone. A browser that knows a login says it with the requests of any page, hence the look at where a
    request comes from; MLflow's own look lets the pages of all servers of this machine pass.
    """

    def __init__(self, app: App, login: str, hosts: Collection[str] = ()) -> None:
        self._app = app
        self._hosts = hosts
        self._expected = b"Basic " + base64.b64encode(login.encode())

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] == "/health"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        # Under another name, a page that made its own name mean this machine would make the browser ask for our login.
        is_foreign = _is_foreign(headers) or not self._is_ours(headers.get(b"host", b"").decode("latin-1"))
        knows = hmac.compare_digest(headers.get(b"authorization", b""), self._expected)
        if scope["type"] == "websocket" and (is_foreign or not knows):
            await send({"type": "websocket.close", "code": 1008})
        elif is_foreign:
            await _answer(send, 403, "a page of another server may not use this one")
        elif not knows:
            # Only a page that is opened makes the browser ask its user.
            ask = [(b"www-authenticate", b'Basic realm="gptloom", charset="UTF-8"')] if _opens_page(headers) else []
            await _answer(send, 401, "the login is in the file `login` of the server's GPTLOOM_HOME", *ask)
        elif scope["type"] == "http" and scope["path"] == ENTER:
            # A page whose address holds a login may not fetch anything; this one does not.
            await _answer(send, 303, "", (b"location", b"//" + headers.get(b"host", b"") + b"/"))
        else:
            await self._app(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        return not self._hosts or any(fnmatchcase(host, pattern) for pattern in self._hosts)


def _is_foreign(headers: dict[bytes, bytes]) -> bool:
    """Does another server's page send this? To be opened by a link there is no harm."""
    origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site", b"none")
    if origin is not None and origin.partition(b"://")[2] != headers.get(b"host"):
        return True
    return site not in (b"none", b"same-origin") and not _opens_page(headers)


def _opens_page(headers: dict[bytes, bytes]) -> bool:
    """A page that is opened, as far as that can be told, or no browser at all."""
    return b"origin" not in headers and headers.get(b"sec-fetch-mode", b"navigate") == b"navigate"


async def _answer(send: Send, status: int, message: str, *headers: tuple[bytes, bytes]) -> None:
    """As MLflow's clients read it."""
    code = {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED"}.get(status)
    body = json.dumps({"error_code": code, "message": message}).encode() if code else b""
    all_headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store"), *headers]
    await send({"type": "http.response.start", "status": status, "headers": all_headers})
    await send({"type": "http.response.body", "body": body})


def create_app() -> Guard:
    """What `--app-name gptloom` names. Without a login in the environment it does not start."""
    user, password = (os.environ[name] for name in MLFLOW_VARIABLES)
    assert user
    assert password
    from mlflow.server.fastapi_app import app

    hosts = os.environ.get(HOSTS_VARIABLE)
    return Guard(app, f"{user}:{password}", hosts.split(",") if hosts else ())

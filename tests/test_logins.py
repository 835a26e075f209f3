"""Who gets in: a real `gptloom up` and a temporary server, asked by nobody in particular, by another user and by pages in a browser.

The tests share one `up`; nothing of gptloom is imported, it is asked through its command, its files and HTTP.
Its small tools are its own, so that the file says the same of trees whose conftest.py lacks them.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import REQUIRE_VARIABLE, ROOT, require
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads command lines in /proc (Linux)"),
]
COMMAND = [str(Path(sys.executable).parent / "gptloom")]
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
TINY = {
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16},
    "train": {"max_steps": 10_000_000, "global_batch_size": 4, "warmup_steps": 2, "eval_tokens": 512},
    "evaluate": {"samples": 1, "sample_tokens": 20, "bootstrap": 0},
    "studies": {"floor": False, "timing": False, "quantization": False, "accumulation": False, "rnn": False},
}
POST = "POST"


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def users_environment(home: Path) -> dict[str, str]:
    """Without what other tests or servers left there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    return kept | {"GPTLOOM_HOME": str(home)}


def ask(url: str, body: Any = None, *, login: str = "", method: str | None = None, **headers: str) -> tuple[int, Any]:
    """Status and body of an answer, whatever the status; a body goes without a Content-Type unless one is given."""
    if login:
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        url, data, {name.replace("_", "-"): value for name, value in headers.items()}, method=method
    )
    if data is not None and "Content_Type" not in headers:
        request.add_unredirected_header("Content-Type", "application/json")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=20) as reply:
            status, text = reply.status, reply.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    with contextlib.suppress(ValueError):
        return status, json.loads(text)
    return status, text.decode(errors="replace")


class Up:
    """A `gptloom up`: where it listens, its home, and what it said."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.home, self.folder = home, folder
        self.ports = free_port(), free_port()
        self.prefect, self.mlflow = (f"http://127.0.0.1:{port}" for port in self.ports)
        self.api = f"{self.prefect}/api"
        self.said = folder / "up.txt"
        self.env = users_environment(home) | {"PREFECT_WORKER_QUERY_SECONDS": "1"}

    @property
    def login(self) -> str:
        path = self.home / "login"
        return path.read_text().strip() if path.exists() else ""

    def start(self) -> None:
        ports = ["--prefect-port", str(self.ports[0]), "--mlflow-port", str(self.ports[1])]
        with open(self.said, "w") as output:
            self.process = subprocess.Popen([*COMMAND, "up", *ports], cwd=ROOT, env=self.env, stdout=output, stderr=output)
        is_up = self.home / "servers.json"
        wait_for(lambda: is_up.exists() or self.process.poll() is not None, self.said.read_text(), 240)
        assert is_up.exists(), self.said.read_text()

    def ask(self, path: str, body: Any = None, method: str | None = None) -> Any:
        """What Prefect's API says to whoever knows the login. A 503 (SQLite is busy) is asked again."""
        deadline = time.monotonic() + 60
        while (answer := ask(f"{self.api}/{path}", body, login=self.login, method=method))[0] == 503:
            assert time.monotonic() < deadline, path
            time.sleep(0.5)
        status, found = answer
        assert status < 300, (path, status, found)
        return found

    def counts(self) -> dict[str, int]:
        """How many things there are that somebody could have made."""
        kinds = ("automations", "variables", "flows", "block_documents")
        found = {kind: len(self.ask(f"{kind}/filter", {})) for kind in kinds}
        body = {"max_results": 1000}
        status, page = ask(f"{self.mlflow}/api/2.0/mlflow/experiments/search", body, login=self.login)
        assert status == 200, page
        return found | {"experiments": len(page.get("experiments", []))}


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("up")
    stack = Up(folder / "home", folder)
    try:
        stack.start()
        yield stack
    finally:
        stack.process.send_signal(signal.SIGTERM)
        assert stack.process.wait(120) == 0, stack.said.read_text()


# --- the login -----------------------------------------------------------------------------------------------------------


def test_the_login_is_in_a_file_of_its_owners_and_nowhere_else(up: Up) -> None:
    """Every user of a machine can read command lines; servers.json, databases and logs are copied and shown."""
    assert re.fullmatch(r"gptloom:[\w-]{20,}", up.login), up.login
    assert stat.S_IMODE((up.home / "login").stat().st_mode) == 0o600
    assert stat.S_IMODE(up.home.stat().st_mode) == 0o700
    secrets = up.login.encode(), up.login.partition(":")[2].encode(), base64.b64encode(up.login.encode())
    places = {str(path): path.read_bytes() for path in up.home.rglob("*") if path.is_file() and path != up.home / "login"}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            places[str(directory / "cmdline")] = (directory / "cmdline").read_bytes()
    places["what it said"] = up.said.read_bytes()
    assert [place for place, text in places.items() if any(secret in text for secret in secrets)] == []
    assert str(up.home / "login") in up.said.read_text()  # no terminal: the file's name, not what is in it


SOCKETS = ("events/in", "events/out", "logs/out", "task_runs/subscriptions/scheduled", "work_pools/cpu/workers/connect")


@pytest.mark.parametrize("path", SOCKETS)
def test_websockets_close_before_a_message_is_read(up: Up, path: str) -> None:
    """Events make automations run: whoever could send one could run code."""
    url = f"{up.api.replace('http', 'ws')}/{path}"
    with pytest.raises(InvalidStatus, match="403"), connect(url, proxy=None):
        pass
    for first in ({"type": "auth", "token": "gptloom:wrong"}, {"type": "auth"}, {"type": "subscribe", "keys": ["x"]}):
        with connect(url, subprotocols=["prefect"], proxy=None) as socket:  # type: ignore[list-item]
            socket.send(json.dumps(first))
            with pytest.raises(ConnectionClosed) as closed:
                print(socket.recv(timeout=20))
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1008


MLFLOW_PATHS = (
    *(
        "",
        "static-files/index.html",
        "version",
        "login",
        "graphql",
        "get-artifact",
        "v1/traces",
        "metrics",
        "docs",
        "openapi.json",
    ),
    *("api/2.0/mlflow/experiments/search", "ajax-api/2.0/mlflow/experiments/create", "ajax-api/3.0/mlflow/server-info"),
    *("api/2.0/mlflow-artifacts/artifacts", "api/2.0/mlflow/runs/create", "gateway/x/mlflow/invocations", "nothing/of/this"),
)


def test_mlflow_answers_nobody_without_the_login(up: Up) -> None:
    for path, method in itertools.product(MLFLOW_PATHS, ("GET", "POST", "PUT", "DELETE", "OPTIONS")):
        status, _ = ask(f"{up.mlflow}/{path}", {} if method == "POST" else None, method=method)
        assert status == 401, (method, path)
    assert ask(f"{up.mlflow}/health")[0] == 200
    for path in ("", "api/2.0/mlflow/experiments/get?experiment_id=0", "version"):
        assert ask(f"{up.mlflow}/{path}", login="gptloom:wrong")[0] == 401
        assert ask(f"{up.mlflow}/{path}", login=up.login)[0] == 200
    with pytest.raises(InvalidStatus, match="403"), connect(f"{up.mlflow.replace('http', 'ws')}/x", proxy=None):
        pass


def test_mlflow_takes_no_login_from_another_servers_page(up: Up) -> None:
    """A browser says a login it knows with the requests of any page; MLflow itself lets those of all local ports pass."""
    before, body = up.counts(), {"name": "planted"}
    url = f"{up.mlflow}/api/2.0/mlflow/experiments/create"
    for origin in ("http://evil.example", f"http://127.0.0.1:{free_port()}", "http://localhost:1", "null", up.prefect):
        for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
            assert ask(url, body, login=up.login, Origin=origin, Content_Type=kind)[0] == 403, origin
    assert ask(url, body, login=up.login, Host="evil.example")[0] == 403
    assert up.counts() == before
    assert ask(f"{up.mlflow}/graphql", {}, login=up.login, Origin="http://evil.example")[0] == 403
    search = f"{up.mlflow}/ajax-api/2.0/mlflow/experiments/search"
    assert ask(search, {"max_results": 1}, login=up.login, Origin=up.mlflow)[0] == 200


def test_another_user_of_the_machine_gets_nothing(up: Up) -> None:
    setpriv, curl = require("setpriv", "becomes another user"), require("curl", "asks as another user")
    if os.geteuid() != 0:
        if os.environ.get(REQUIRE_VARIABLE) == "1":
            pytest.fail(f"only root can become another user ({REQUIRE_VARIABLE}=1)")
        pytest.skip("only root can become another user")

    def as_nobody(*command: str) -> str:
        return subprocess.run([setpriv, *NOBODY[1:], *command], cwd="/", capture_output=True, text=True, timeout=60).stdout

    code = ("-s", "-o", "/dev/null", "-w", "%{http_code}", "--noproxy", "*")
    assert as_nobody("id", "-u").strip() == "65534"
    assert as_nobody(curl, *code, f"{up.api}/health") == "200"
    for url in (f"{up.api}/flow_runs/filter", f"{up.api}/variables/", f"{up.mlflow}/api/2.0/mlflow/experiments/create"):
        assert as_nobody(curl, *code, "-X", POST, "-H", "Content-Type: application/json", "-d", '{"name":"x"}', url) == "401", (
            url
        )
    assert as_nobody("cat", str(up.home / "login")) == ""
    assert as_nobody("ls", str(up.home)) == ""


# --- a browser -----------------------------------------------------------------------------------------------------------


class Browser:
    """Chromium without a window, driven through its DevTools; every name but 127.0.0.1 leads to this machine."""

    def __init__(self, profile: Path) -> None:
        chromium = require("chromium", "opens pages as a user's browser does")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        flags += ["--host-resolver-rules=MAP *.example 127.0.0.1", "--no-proxy-server", f"--user-data-dir={profile}"]
        flags += ["--remote-debugging-port=0", "--remote-allow-origins=*", "--window-size=1440,1300", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([chromium, *flags], start_new_session=True, **quiet)
        told = profile / "DevToolsActivePort"
        wait_for(lambda: told.exists() and told.read_text().count("\n"), "Chromium did not start")
        _, pages = ask(f"http://127.0.0.1:{told.read_text().splitlines()[0]}/json/list")
        (page,) = (page for page in pages if page["type"] == "page")
        self.socket = connect(page["webSocketDebuggerUrl"], max_size=None, proxy=None, open_timeout=60)
        self.ids = itertools.count(1)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.ids)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv(timeout=60))).get("id") != number:
            pass
        assert "error" not in answer, answer
        return dict(answer["result"])

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        wait_for(lambda: self.js("document.readyState") == "complete", url)

    def js(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def text(self) -> str:
        return str(self.js("document.body ? document.body.innerText : ''"))

    def wait(self, words: str, seconds: float = 60) -> None:
        wait_for(lambda: words in self.text(), f"no {words!r} on the page", seconds)

    def press(self, words: str) -> None:
        """A click on the last button or link that says just this."""
        found = f"[...document.querySelectorAll('button, a')].filter(it => it.innerText.trim() == {json.dumps(words)}).pop()"
        wait_for(lambda: self.js(f"!!{found}"), f"nothing says {words!r}")
        self.js(f"{found}.click()")

    def type(self, text: str) -> None:
        self.js("document.querySelector('input').focus()")
        self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>a page of somebody's</title><p>hello")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def foreign_page() -> Iterator[int]:
    """The port of a server with a page of somebody's."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


# A page's ways to send something: without a type, as text, as a form, by fetch and by beacon.
PLANT = """(async () => {
  const send = (url, body, type) => fetch(url, {method: 'POST', mode: 'no-cors', credentials: 'include',
    body: type === undefined ? new Blob([JSON.stringify(body)]) : new Blob([JSON.stringify(body)], {type})}).catch(() => null);
  for (const [url, body] of %s) {
    for (const type of [undefined, 'text/plain', 'application/x-www-form-urlencoded']) await send(url, body, type);
    navigator.sendBeacon(url, new Blob([JSON.stringify(body)]));
  }
  await new Promise(resolve => setTimeout(resolve, 300));
  const read = url => fetch(url, {method: 'POST', headers: {'Content-Type': 'application/json'}, credentials: 'include', body: '{}'})
    .then(reply => reply.status).catch(() => 'blocked');
  return [await read(%s), await read(%s)];
})()"""


def plant(browser: Browser, api: str, mlflow: str) -> list[Any]:
    """Let the page that the browser shows do what it can; returns what it could read of both servers."""
    automation = {
        "name": "planted",
        "trigger": {"type": "event", "posture": "Reactive", "threshold": 1, "within": 0, "expect": ["*"]},
        "actions": [{"type": "do-nothing"}],
    }
    requests = [
        (f"{api}/automations/", automation),
        (f"{api}/variables/", {"name": "planted", "value": "x"}),
        (f"{api}/flows/", {"name": "planted"}),
        (f"{mlflow}/api/2.0/mlflow/experiments/create", {"name": "planted"}),
        (f"{mlflow}/ajax-api/2.0/mlflow/experiments/create", {"name": "planted-too"}),
    ]
    reads = json.dumps(f"{api}/flows/filter"), json.dumps(f"{mlflow}/api/2.0/mlflow/experiments/search")
    return list(browser.js(PLANT % (json.dumps(requests), *reads)))


@pytest.mark.parametrize("knows_the_login", [False, True])
def test_a_page_of_another_server_makes_nothing(up: Up, browser: Browser, foreign_page: int, knows_the_login: bool) -> None:
    """CORS hides answers from it; what it sent was done all the same, and an automation ran any command of its choice."""
    before = up.counts()
    found: list[Any] = []
    if knows_the_login:  # the browser has the login of MLflow's page and goes on saying it
        browser.go(f"http://{up.login}@{up.mlflow.removeprefix('http://')}/version")
        browser.go(f"{up.mlflow}/version")
        assert re.fullmatch(r"\d+\.\d+.*", browser.text())
    for host in ("127.0.0.1", "localhost", "somebody.example"):
        browser.go(f"http://{host}:{foreign_page}/")
        browser.wait("hello")
        found += plant(browser, up.api, up.mlflow)
    assert up.counts() == before
    assert set(found) <= {"blocked", 401, 403}


def test_a_name_that_leads_here_makes_nothing(up: Up, browser: Browser) -> None:
    """DNS rebinding: to the browser the page and the server are one, so that CORS says nothing."""
    before, found = up.counts(), []
    for port, path in ((up.ports[0], "ui-settings"), (up.ports[1], "health")):
        host = f"http://evil.example:{port}"
        browser.go(f"{host}/{path}")
        assert browser.js("location.host") == f"evil.example:{port}"
        found += plant(browser, f"http://evil.example:{up.ports[0]}/api", f"http://evil.example:{up.ports[1]}")
    assert up.counts() == before
    assert set(found) <= {"blocked", 401, 403}


def test_prefects_page_asks_once_and_starts_a_run(up: Up, browser: Browser) -> None:
    deployment = up.ask("deployments/name/reconcile/reconcile")["id"]
    browser.go(f"{up.prefect}/deployments")
    wait_for(lambda: browser.js("!!document.querySelector('input[type=password]')"), "the page asks for nothing", 30)
    assert "shakespeare" not in browser.text()
    browser.type(up.login)
    browser.wait("shakespeare")
    before = {run["id"] for run in up.ask("flow_runs/filter", {"deployments": {"id": {"any_": [deployment]}}})}
    browser.go(f"{up.prefect}/deployments/deployment/{deployment}/run")  # a new page: it does not ask again
    browser.wait("Put it right")
    browser.press("Submit")
    made: dict[str, Any] = {}

    def ended() -> bool:
        runs = up.ask("flow_runs/filter", {"deployments": {"id": {"any_": [deployment]}}})
        made.update(next((run for run in runs if run["id"] not in before and not run["auto_scheduled"]), {}))
        return made.get("state_type") in ("COMPLETED", "FAILED", "CRASHED")

    wait_for(ended, f"no run of the form's: {browser.text()}", 90)
    assert made["state_type"] == "COMPLETED", made["state"]


def test_mlflows_page_opens_with_the_link(up: Up, browser: Browser) -> None:
    """The address that `up` prints on a terminal holds the login; a page at such an address may fetch nothing, so it leads on."""
    status, _ = ask(f"{up.mlflow}/api/2.0/mlflow/experiments/create", {"name": "to be seen"}, login=up.login)
    assert status == 200
    browser.go(f"http://{up.login}@{up.mlflow.removeprefix('http://')}/login")
    browser.wait("MLflow")
    assert browser.js("location.href").startswith(f"{up.mlflow}/")
    browser.go(f"{up.mlflow}/#/experiments")
    browser.wait("to be seen")


# --- secrets in forms ----------------------------------------------------------------------------------------------------

Place = tuple[str | int, ...]


def text_fields(schema: dict[str, Any], node: dict[str, Any], place: Place = ()) -> Iterator[Place]:
    """Where in a form text can be typed: names of fields, 0 for an entry of a list."""
    if "$ref" in node:
        yield from text_fields(schema, schema["definitions"][node["$ref"].rpartition("/")[2]], place)
    for part in ("anyOf", "allOf", "oneOf"):
        for other in node.get(part, []):
            yield from text_fields(schema, other, place)
    if node.get("type") == "string":
        yield place
    if "items" in node:
        yield from text_fields(schema, node["items"], (*place, 0))
    for name, field in node.get("properties", {}).items():
        yield from text_fields(schema, field, (*place, name))


def planted_at(place: Place, secret: str) -> Any:
    if not place:
        return secret
    inner = planted_at(place[1:], secret)
    return [inner] if place[0] == 0 else {place[0]: inner}


def test_no_text_field_of_any_form_takes_a_secret(up: Up) -> None:
    """Prefect keeps parameters in clear, shows them to all, and they go on to MLflow, journals and reports."""
    planted, taken, seen = "hunter2planted", [], set()
    secrets = [
        f"https://me:{planted}@host/a.txt",
        f"slack://{planted}@channel",
        f"https://host/a.txt?v=1&Access_Token={planted}",
        f"x\nhttps://me:{planted}@host",
    ]
    for deployment in up.ask("deployments/filter", {}):
        schema = deployment["parameter_openapi_schema"]
        for place in dict.fromkeys(text_fields(schema, {"properties": schema["properties"]})):
            seen.add(place[-1] if place[-1] != 0 else place[-2])
            for secret in [*secrets, *([f"json://host/{planted}"] if "notify" in place else [])]:
                url = f"{up.api}/deployments/{deployment['id']}/create_flow_run"
                body = {"parameters": planted_at(place, secret), "state": {"type": "SCHEDULED"}}
                status, _ = ask(url, body, login=up.login)
                if not 400 <= status < 500:
                    taken.append((deployment["name"], place, secret))
    assert {"experiment", "data_source", "corpus", "more", "notify", "model", "reason", "name", "resume"} <= seen
    assert taken == []
    for path in up.home.rglob("*"):
        if path.is_file():
            assert planted.encode() not in path.read_bytes(), path


def test_an_old_deployment_with_an_address_in_it_is_refused_and_told_why(up: Up) -> None:
    """Made before the form asked for names: the next night fails with the way out, it does not just tell nobody."""
    nightly = up.ask("deployments/name/nightly/nightly")
    settings = {"notify": ["json://127.0.0.1/oldtoken"]}
    body = {
        "name": "old-night",
        "flow_id": nightly["flow_id"],
        "deployment_id": nightly["id"],
        "work_pool_name": "cpu",
        "work_queue_name": "default",
        "parameters": nightly["parameters"] | {"settings": settings},
        "state": {"type": "SCHEDULED"},
    }
    old = {"flow_id": nightly["flow_id"], "name": "old", "enforce_parameter_schema": False, "parameters": body["parameters"]}
    old |= {key: nightly[key] for key in ("entrypoint", "pull_steps", "path", "parameter_openapi_schema", "work_pool_name")}
    made = up.ask("deployments/", old)
    run = up.ask(f"deployments/{made['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})["id"]
    found: dict[str, Any] = {}

    def ended() -> bool:
        found.update(up.ask(f"flow_runs/{run}"))
        return found["state_type"] in ("COMPLETED", "FAILED", "CRASHED")

    wait_for(ended, "the night did not end", 90)
    assert found["state_type"] == "FAILED", found["state"]
    assert "environment variable" in found["state"]["message"], found["state"]
    assert "oldtoken" not in found["state"]["message"]
    up.ask(f"deployments/{made['id']}", method="DELETE")


# --- every route: last of what shares the server, for one that answered would do what it is asked ---


def prefect_routes(up: Up) -> list[tuple[str, str]]:
    """Every route below /api, with something in the place of its parameters."""
    status, schema = ask(f"{up.prefect}/openapi.json")
    assert status == 200
    something = "00000000-0000-0000-0000-000000000000"
    return [
        (method.upper(), re.sub(r"{[^}]*}", something, path))
        for path, methods in schema["paths"].items()
        for method in methods
        if method in ("get", "post", "put", "patch", "delete")
    ]


def test_prefect_answers_nobody_without_the_login(up: Up) -> None:
    routes = prefect_routes(up)
    assert len(routes) > 150, routes
    open_ones = {
        (method, path)
        for method, path in routes
        if ask(f"{up.api}/{path.removeprefix('/api').lstrip('/')}", {} if method != "GET" else None, method=method)[0] != 401
    }
    assert open_ones == {("GET", "/health"), ("GET", "/ready")}
    for path in ("docs", "openapi.json", "redoc", "static/prefect-logo-mark-gradient.png", "nothing/of/this"):
        assert ask(f"{up.api}/{path}")[0] == 401, path
    assert ask(f"{up.api}/version")[0] == 401
    assert ask(f"{up.api}/version", login="gptloom:wrong")[0] == 401
    assert ask(f"{up.api}/version", login=up.login)[0] == 200


# --- the temporary server --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory, small_text: Path) -> Iterator[tuple[str, Path]]:
    """The address of the server that a `gptloom run` has while it runs, and the home."""
    folder = tmp_path_factory.mktemp("temporary")
    (folder / "tiny.yaml").write_text(json.dumps(TINY))
    home = folder / "home"
    call = [*COMMAND, "run", "tiny.yaml", f"data.source={small_text}"]
    with open(folder / "said.txt", "w") as said:
        process = subprocess.Popen(call, cwd=folder, env=users_environment(home), stdout=said, stderr=said)

    def address() -> str:
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (directory / "cmdline").read_bytes().decode().split("\0")
                if "uvicorn" in words and f"GPTLOOM_HOME={home}".encode() in (directory / "environ").read_bytes().split(b"\0"):
                    return f"http://127.0.0.1:{words[words.index('--port') + 1]}"
        return ""

    def answers() -> bool:
        with contextlib.suppress(OSError):
            return bool(address()) and ask(f"{address()}/api/health")[0] == 200
        return False

    try:
        wait_for(answers, "no temporary server")
        yield address(), home
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 75, (folder / "said.txt").read_text()


def test_the_temporary_server_lets_nobody_in(temporary: tuple[str, Path], browser: Browser, foreign_page: int) -> None:
    """What is planted there stays in the home's database, and the next server acts on it."""
    url, home = temporary
    login = (home / "login").read_text().strip() if (home / "login").exists() else ""
    counts = {kind: ask(f"{url}/api/{kind}/filter", {}, login=login) for kind in ("automations", "variables")}
    found: list[Any] = []
    for page in (f"http://127.0.0.1:{foreign_page}/", f"http://evil.example:{urllib.parse.urlsplit(url).port}/ui-settings"):
        browser.go(page)
        host = url if "evil" not in page else page.removesuffix("/ui-settings")
        found += plant(browser, f"{host}/api", host)
    assert {kind: ask(f"{url}/api/{kind}/filter", {}, login=login) for kind in counts} == counts
    assert set(found) <= {"blocked", 401, 404}
    assert ask(f"{url}/api/flows/", {"name": "planted"})[0] == 401
    assert ask(f"{url}/api/version", login=login)[0] == 200
    request = urllib.request.Request(f"{url}/api/health", headers={"Origin": "http://evil.example"})
    with urllib.request.urlopen(request, timeout=20) as reply:
        assert reply.headers["access-control-allow-origin"] is None


# --- the home --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "name", "umask"), [("run", "", 0), ("run", "a/home", 0o022), ("sync", "a/home", 0), ("core", "", 0)]
)
def test_a_new_home_is_its_owners_alone(tmp_path: Path, small_text: Path, verb: str, name: str, umask: int) -> None:
    """Whoever makes it, under whatever name, whatever the umask says."""
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    # A server that is not there: the verb ends as soon as it has made what it needs.
    env = users_environment(Path(name)) | ({"PREFECT_API_URL": "http://127.0.0.1:9/api"} if verb == "run" else {})
    if not name:
        del env["GPTLOOM_HOME"]
    source = f"data.source={small_text}"
    verbs = {
        "run": [*COMMAND, "run", "tiny.yaml", source],
        "sync": [*COMMAND, "sync"],
        "core": [sys.executable, "-m", "gptcore.corpus", "tiny.yaml", source],
    }
    subprocess.run(verbs[verb], cwd=tmp_path, env=env, umask=umask, capture_output=True, timeout=120)
    home = tmp_path / (name or ".gptloom")
    assert stat.S_IMODE(home.stat().st_mode) == 0o700

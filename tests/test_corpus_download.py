"""Text from elsewhere: an http server that breaks off, stalls, lies and changes its mind, and the hub's API, all on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptcore import corpus
from gptcore.config import DataConfig, UserError
from gptcore.corpus import download
from gptcore.corpus.hub import _explained
from gptcore.store import read_manifest

RNG = random.Random(5)
TEXT = "\n\n".join(" ".join("".join(RNG.choices("abcdefgh", k=6)) for _ in range(30)) for _ in range(300)).encode()

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers as the test says: one function a request, the last one for all further requests."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server: Any = self.server
        server.requests.append((self.path, dict(self.headers)))
        answers = server.answers
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass

    def head(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def hang_up(self) -> None:
        self.close_connection = True


class Server(ThreadingHTTPServer):
    """A server whose clients may hang up without a traceback on stderr."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """With a login for it, whose password no message may hold."""
    netrc = tmp_path_factory.mktemp("login") / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password hunter2\n")
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(download, "RETRY_SECONDS", (0.0, 0.0))
    with Server(("127.0.0.1", 0), Handler) as made:
        made.answers, made.requests = [whole], []  # type: ignore[attr-defined]
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield made
        made.shutdown()


def whole(handler: Handler, content: bytes = TEXT, etag: str = '"v1"') -> None:
    if handler.headers.get("If-None-Match") == etag:
        handler.head(304, 0)
        return
    match = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    if match and handler.headers.get("If-Range") == etag:
        start = int(match.group(1))
        handler.head(206, len(content) - start, ETag=etag, Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.wfile.write(content[start:])
    else:
        handler.head(200, len(content), ETag=etag)
        handler.wfile.write(content)


def broken_off(handler: Handler) -> None:
    handler.head(200, len(TEXT), ETag='"v1"')
    handler.wfile.write(TEXT[:20_000])
    handler.hang_up()


def url(server: Any, path: str = "/text.txt", pin: bytes | None = None) -> str:
    fragment = f"#sha256={hashlib.sha256(pin).hexdigest()}" if pin is not None else ""
    return f"http://127.0.0.1:{server.server_port}{path}{fragment}"


def build(source: str, home: Path, **settings: Any) -> Path:
    return corpus.build_corpus(DataConfig(source=source, **settings), home)


def text(directory: Path) -> bytes:
    records = [record for split in corpus.SPLITS for record in corpus.read_records(directory, split)]
    return "".join(r.text for r in sorted(records, key=lambda r: (r.document, r.section))).encode()


def downloads(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "data" / "downloads").iterdir())


def test_pinned_address_is_fetched_once(tmp_path: Path, server: Any) -> None:
    """Guards the pin: right content is taken, and then no network is needed."""
    source = url(server, pin=TEXT)
    found = build(source, tmp_path)
    assert text(found) == TEXT
    server.answers = [lambda handler: handler.head(500, 0)]
    assert build(source, tmp_path) == found
    assert len(server.requests) == 1
    assert server.requests[0][1]["Authorization"] == "Basic dXNlcjpodW50ZXIy"  # the login from netrc
    assert [name for name in downloads(tmp_path) if "part" in name] == []


def test_address_is_asked_whether_it_changed(tmp_path: Path, server: Any, caplog: pytest.LogCaptureFixture) -> None:
    found = build(url(server), tmp_path)
    assert build(url(server), tmp_path) == found
    assert server.requests[-1][1]["If-None-Match"] == '"v1"'
    longer = TEXT + b"\n\nand one more paragraph"
    server.answers = [lambda handler: whole(handler, longer, '"v2"')]
    assert text(build(url(server), tmp_path)) == longer
    server.answers = [lambda handler: handler.head(503, 0)]
    assert text(build(url(server), tmp_path)) == longer
    assert "the copy that is here is used" in caplog.text
    assert "hunter2" not in caplog.text


def test_broken_download_is_resumed(tmp_path: Path, server: Any) -> None:
    """Guards against starting over, and against two halves of different files."""
    server.answers = [broken_off, whole]
    assert text(build(url(server, pin=TEXT), tmp_path)) == TEXT
    assert server.requests[1][1]["Range"] == "bytes=20000-"
    assert server.requests[1][1]["If-Range"] == '"v1"'


def test_file_that_changed_is_not_pieced_together(tmp_path: Path, server: Any) -> None:
    other = TEXT[::-1]
    server.answers = [broken_off, lambda handler: whole(handler, other, '"v2"')]
    assert text(build(url(server), tmp_path)) == other


def test_kill_between_two_runs_is_resumed(tmp_path: Path, server: Any) -> None:
    server.answers = [broken_off]
    with pytest.raises(UserError, match="check address and network"):
        build(url(server), tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))
    server.answers = [whole]
    server.requests.clear()
    assert text(build(url(server), tmp_path)) == TEXT
    assert server.requests[0][1]["Range"] == "bytes=20000-"


def lie_long(handler: Handler) -> None:
    handler.head(200, len(TEXT) + 1000)
    handler.wfile.write(TEXT)
    handler.hang_up()


def lie_short(handler: Handler) -> None:
    handler.head(200, len(TEXT) - 1000)
    handler.wfile.write(TEXT)
    handler.hang_up()


def stall(handler: Handler) -> None:
    handler.head(200, len(TEXT))
    handler.wfile.write(TEXT[:100])
    time.sleep(1.5)
    handler.hang_up()


def drip(handler: Handler) -> None:
    handler.head(200, len(TEXT))
    for byte in range(40):
        try:
            handler.wfile.write(TEXT[byte : byte + 1])
        except OSError:
            break
        time.sleep(0.05)
    handler.hang_up()


def chunked(handler: Handler, content: bytes = TEXT, last: bool = True) -> None:
    handler.head(200, None, Transfer_Encoding="chunked")
    for at in range(0, len(content), 5000):
        piece = content[at : at + 5000]
        try:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        except OSError:
            break
    if last:
        handler.wfile.write(b"0\r\n\r\n")
    handler.hang_up()


def redirect_loop(handler: Handler) -> None:
    handler.head(302, 0, Location="/again.txt")


def redirect_to_file(handler: Handler) -> None:
    handler.head(302, 0, Location="file:///etc/hostname")


def wrong_part(handler: Handler) -> None:
    handler.head(206, 100, Content_Range="bytes 5-104/105")
    handler.wfile.write(TEXT[:100])


def nonsense(handler: Handler) -> None:
    handler.wfile.write(b"\0\0\0 this is not HTTP\r\n\r\n")
    handler.hang_up()


@pytest.mark.parametrize(
    ("answer", "settings", "words"),
    [
        (lie_long, {}, "the connection broke at"),
        (stall, {"timeout_seconds": 0.2}, "Time|time"),
        (drip, {"timeout_seconds": 0.8}, "stalls"),
        (lambda h: chunked(h, last=False), {}, "Protocol|Chunk|Incomplete|Invalid"),
        (lambda h: h.head(404, 0), {}, "HTTP 404; correct the address"),
        (lambda h: h.head(403, 0), {}, "HTTP 403"),
        (lambda h: h.head(500, 0), {}, "HTTP 500; check address and network"),
        (lambda h: h.head(429, 0), {}, "HTTP 429; check"),
        (lambda h: h.head(416, 0), {}, "HTTP 416"),
        (redirect_loop, {}, "TooManyRedirects"),
        (redirect_to_file, {}, "InvalidSchema"),
        (wrong_part, {}, "another part"),
        (nonsense, {}, "127.0.0.1"),
        (whole, {"max_download_bytes": 5000}, "more than data.max_download_bytes=5000"),
        (chunked, {"max_download_bytes": 5000}, "sends more than data.max_download_bytes=5000"),
        (lambda h: h.head(200, 1 << 60), {"max_download_bytes": 1 << 62}, "do not fit on the disk"),
        (lambda h: whole(h, b""), {}, "no text in it"),
        (lambda h: h.head(200, 5, Content_Encoding="br"), {}, "Content-Encoding 'br'"),
    ],
)
def test_bad_servers_are_refused(tmp_path: Path, server: Any, answer: Answer, settings: dict[str, Any], words: str) -> None:
    """Guards against hanging, against half a file taken for a whole one, and against a password in the log."""
    server.answers = [answer]
    began = time.monotonic()
    with pytest.raises(UserError, match=words) as caught:
        build(url(server), tmp_path, **settings)
    assert time.monotonic() - began < 8
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.parquet"))


def test_wrong_content_is_refused_and_dropped(tmp_path: Path, server: Any) -> None:
    with pytest.raises(UserError, match="not the pinned") as caught:
        build(url(server, pin=b"something else"), tmp_path)
    assert hashlib.sha256(TEXT).hexdigest() in str(caught.value)
    assert downloads(tmp_path) == []
    server.answers = [lie_short]  # fewer bytes than there are: whole by its own account, but for the pin
    with pytest.raises(UserError, match="not the pinned"):
        build(url(server, pin=TEXT), tmp_path)


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "RETRY_SECONDS", (0.0,))
    with pytest.raises(
        UserError, match=r"http://127\.0\.0\.1:9/a\.txt: the connection broke.*ConnectionError.*data\.source=PATH"
    ):
        build("http://127.0.0.1:9/a.txt", tmp_path)


def test_names_and_chunks(tmp_path: Path, server: Any) -> None:
    """Guards formats behind addresses: the path's name counts, the Content-Type where it has none, and no length is needed."""
    server.answers = [chunked]
    assert text(build(url(server, "/a/text%2Etxt?x=1"), tmp_path)) == TEXT
    page = b"<p>" + TEXT.replace(b"\n\n", b"</p><p>")
    server.answers = [lambda h: (h.head(200, len(page), Content_Type="text/html"), h.wfile.write(page))]
    assert text(build(url(server, "/page"), tmp_path)) == TEXT.replace(b"\n\n", b"\n")


# --- the hub -----------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The endpoints of the hub that huggingface_hub calls for a data set: its facts, and its files."""

    def __init__(self, files: dict[str, bytes], licence: str = "cc0-1.0") -> None:
        self.files, self.licence = files, licence

    def __call__(self, handler: Handler) -> None:
        path = handler.path.partition("?")[0]
        if match := re.fullmatch(r"/api/datasets/me/texts(?:/revision/([^/]+))?", path):
            if match.group(1) not in (None, "main", COMMIT):
                self.fail(handler, 404, "RevisionNotFound")
                return
            facts = {
                "_id": "1",
                "id": "me/texts",
                "sha": COMMIT,
                "private": False,
                "downloads": 0,
                "likes": 0,
                "tags": [f"license:{self.licence}"],
                "siblings": [{"rfilename": name, "size": len(content)} for name, content in self.files.items()],
            }
            body = json.dumps(facts).encode()
            handler.head(200, len(body), Content_Type="application/json")
            handler.wfile.write(body)
        elif match := re.fullmatch(rf"/datasets/me/texts/resolve/{COMMIT}/(.+)", path):
            content = self.files[match.group(1)]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            handler.head(200, len(content), ETag=etag, X_Repo_Commit=COMMIT, X_Linked_Size=str(len(content)))
            if handler.command == "GET":
                handler.wfile.write(content)
        else:
            self.fail(handler, 404, "RepoNotFound")

    def fail(self, handler: Handler, status: int, code: str) -> None:
        handler.head(status, 0, X_Error_Code=code)


def table(*texts: str) -> bytes:
    buffer = BytesIO()
    pq.write_table(pa.table({"text": list(texts)}), buffer)
    return buffer.getvalue()


@pytest.fixture
def hub(server: Any, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(
        {
            "data/train-00000.parquet": table(TEXT[:9000].decode(), "second"),
            "data/train-00001.parquet": table(TEXT[9000:].decode()),
            "other/notes.txt": TEXT,
            "script.py": b"raise SystemExit('data set code was run')",
        }
    )
    server.answers = [made]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    return made


def test_hub_data_set_is_read(tmp_path: Path, server: Any, hub: Hub) -> None:
    """Guards `hf://`: Parquet files only, in order, no code run, licence and title in the manifest."""
    found = build("hf://datasets/me/texts", tmp_path)
    assert text(found) == TEXT[:9000] + b"second" + TEXT[9000:]
    (source,) = read_manifest(found)["sources"]
    assert (source["title"], source["licence"], source["files"]) == ("me/texts", "cc0-1.0", 2)
    assert text(build("hf://datasets/me/texts/other/*@main", tmp_path)) == TEXT
    assert text(build("hf://datasets/me/texts/data/train-00001.parquet", tmp_path)) == TEXT[9000:]


def test_hub_commit_needs_no_network_the_second_time(tmp_path: Path, server: Any, hub: Hub) -> None:
    source = f"hf://datasets/me/texts@{COMMIT}"
    found = build(source, tmp_path)
    count = len(server.requests)
    assert build(source, tmp_path) == found
    assert len(server.requests) == count


@pytest.mark.parametrize(
    ("source", "settings", "words"),
    [
        ("hf://datasets/me", {}, "expected hf://"),
        ("hf://datasets/me/none", {}, "no such data set, or it is private"),
        ("hf://datasets/me/texts@gone", {}, "no such revision"),
        ("hf://datasets/me/texts/*.csv", {}, "no file matches"),
        ("hf://datasets/me/texts", {"max_download_bytes": 1000}, "max_download_bytes=1000"),
        ("hf://datasets/me/te..xts", {}, "not a usable name"),
        ("hf://datasets/me/texts", {"text_column": "body"}, "no column 'body', there are text"),
    ],
)
def test_hub_mistakes_are_explained(tmp_path: Path, hub: Hub, source: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        build(source, tmp_path, **settings)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("documents.parquet"))


def test_hub_that_is_away_or_lies(tmp_path: Path, server: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers = [lambda handler: handler.head(500, 0)]
    with pytest.raises(UserError, match="cannot be reached"):
        build("hf://datasets/me/texts", tmp_path)
    server.answers = [hub]
    honest = dict(hub.files)

    def lying(handler: Handler) -> None:
        if "/api/" not in handler.path:
            hub.files = {name: content[:-50] for name, content in honest.items()}
        hub(handler)

    server.answers = [lying]
    with pytest.raises(UserError, match=r"were promised|incomplete"):
        build("hf://datasets/me/texts", tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9 cannot be reached"):
        build("hf://datasets/me/texts", tmp_path)


def test_a_torn_file_of_the_hub_is_said_and_a_full_disk_stays_one():
    """The library's own error has no class; the system's has a number."""
    with pytest.raises(UserError, match="arrived incomplete"), _explained("hf://datasets/a/b/c.parquet"):
        raise OSError("not the size that was promised")
    with pytest.raises(OSError, match="No space") as caught, _explained("hf://datasets/a/b/c.parquet"):
        raise OSError(28, "No space left on device")
    assert caught.value.errno == 28

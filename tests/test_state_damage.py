"""What a kill, a failing disk or somebody's hand leaves of small state files: each is named, and what lies beside it works on.

Through the command and files alone. The runs here are written by hand, as they lay in homes before lines had checksums.
"""

from __future__ import annotations

import ctypes
import fcntl
import http.server
import json
import os
import resource
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

pytestmark = pytest.mark.integration
GPTLOOM = Path(sys.executable).with_name("gptloom")
TINY = ROOT / "experiments" / "tiny.yaml"
RUN = "toy-20261124-103000-aaaa"
NEIGHBOUR = "toy-20261124-113000-bbbb"
GONE = 2**22 + 1  # a process id that no process has


def call(home: Path, *words: str | Path, **options: Any) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON of stdout's last line, stderr."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    done = subprocess.run(
        [GPTLOOM, *map(str, words)],
        cwd=ROOT,
        env=environment | {"GPTLOOM_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=180,
        **options,
    )
    return done.returncode, json.loads((done.stdout.splitlines() or ["{}"])[-1]), done.stderr


def write_run(home: Path, name: str, *, is_closed: bool = True) -> Path:
    """A run of one number, with its settings; the path of its journal."""
    opened = {"run": name, "parent": None, "title": name, "host": socket.gethostname(), "pid": GONE}
    lines: list[dict[str, Any]] = [
        {"kind": "open", **opened},
        {"kind": "params", "values": {"name": "toy"}},
        {"kind": "metrics", "step": 1, "tokens_seen": 8, "values": {"train/loss": 2.5}},
        {"kind": "metrics", "step": 2, "tokens_seen": 16, "values": {"train/loss": 1.5}},
        {"kind": "close", "status": "FINISHED", "reason": ""},
    ]
    folder = home / "runs" / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: toy\ntrain: {max_steps: 2, warmup_steps: 1}\n")
    text = "".join(
        json.dumps({"seq": number, "attempt": 0, "time_ms": 1795898713669 + number, **line}) + "\n"
        for number, line in enumerate(lines[: None if is_closed else -1])
    )
    (folder / "metrics.jsonl").write_text(text)
    return folder / "metrics.jsonl"


def in_mlflow(home: Path) -> dict[str, tuple[str, list[float]]]:
    """Run → its status and its losses, straight from the database."""
    with sqlite3.connect(home / "mlflow.db") as database:
        runs = database.execute(
            "select tags.value, runs.status, runs.run_uuid from runs join tags using (run_uuid) where tags.key = 'gptloom.run'"
        ).fetchall()
        losses = "select value from metrics where run_uuid = ? and key = 'train/loss' order by step"
        return {name: (status, [value for (value,) in database.execute(losses, (key,))]) for name, status, key in runs}


def put_line(journal: Path, line: bytes, at: int = 3) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:at], line + b"\n", *lines[at:]]))


# --- a damaged run beside a whole one --------------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a line of garbage": lambda journal: put_line(journal, b"\x8f\x01garbage"),
    "zeros where a block was": lambda journal: put_line(journal, b"\0" * 4096 + b'ues": {"train/loss": 9.0}}'),
    "no settings": lambda journal: journal.with_name("config.yaml").unlink(),
    "tags of nothing": lambda journal: journal.with_name("tags.json").touch(),
}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.usefixtures("mlflow_store")
def test_sync_goes_on_with_the_rest(home: Path, what: str) -> None:
    journal = write_run(home, RUN)
    write_run(home, NEIGHBOUR)
    DAMAGE[what](journal)
    code, result, stderr = call(home, "sync")
    assert (code, result) == (0, {"runs": [RUN, NEIGHBOUR], "missing": []}), stderr
    assert in_mlflow(home) == dict.fromkeys((RUN, NEIGHBOUR), ("FINISHED", [2.5, 1.5]))
    if what != "no settings":  # which journal and name know without them
        assert f"{home}/runs/{RUN}/{'tags.json' if what.startswith('tags') else 'metrics.jsonl: line 4'}" in stderr


@pytest.mark.usefixtures("mlflow_store")
def test_reconcile_goes_on_with_the_rest(home: Path) -> None:
    """Two dead runs, one of them damaged, and one whose journal a power cut has filled with zeros."""
    put_line(write_run(home, RUN, is_closed=False), b"\0\0\0")
    write_run(home, NEIGHBOUR, is_closed=False)
    zeros = write_run(home, "toy-20261124-123000-cccc")
    zeros.write_bytes(b"\0" * 4096)
    code, result, stderr = call(home, "reconcile", "--apply")
    assert code == 0, stderr
    assert result["counts"] == {"done": 2}
    assert in_mlflow(home) == dict.fromkeys((RUN, NEIGHBOUR), ("FAILED", [2.5, 1.5]))
    assert f"{RUN}/metrics.jsonl: line 4" in stderr


def test_doctor_names_each(home: Path) -> None:
    put_line(write_run(home, RUN), b"garbage")
    write_run(home, NEIGHBOUR).with_name("config.yaml").write_text("")
    ledger = home / "nightly" / "toy" / "ledger.json"
    ledger.parent.mkdir(parents=True)
    ledger.write_bytes(b"\0" * 100)
    _, result, stderr = call(home, "doctor")
    told = {check["message"]: check["remedy"] for check in result["checks"] if check["name"] == "records"}
    assert len(told) == 3, stderr
    for path in (f"{RUN}/metrics.jsonl: line 4 is damaged", f"{NEIGHBOUR}/config.yaml: damaged", f"{ledger}: damaged"):
        assert [remedy for message, remedy in told.items() if path in message and remedy], stderr


# --- a run that is to go on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("left", "told"), [("config.yaml", "config.yaml: damaged, the file is empty"), (".lock", "anew")])
@pytest.mark.usefixtures("mlflow_store")
def test_resume_begins_no_other_experiment(home: Path, left: str, told: str) -> None:
    """Of a run that was killed in its first second, or whose settings are lost: all defaults are another experiment."""
    folder = write_run(home, RUN).parent
    for path in folder.iterdir():
        if left == ".lock":
            path.unlink()
    (folder / left).write_text("")
    code, result, stderr = call(home, "run", "--resume", RUN, "data.source=/nowhere")
    assert (code, told in result["error"], RUN in result["error"]) == (2, True, True), stderr
    assert (folder / left).read_text() == ""


# --- servers that are gone -------------------------------------------------------------------------------------------------


class _Stranger(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.usefixtures("mlflow_store")
def test_whoever_listens_where_a_killed_server_was_is_not_believed(home: Path) -> None:
    write_run(home, RUN)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        (home / "servers.json").write_text(json.dumps({"prefect_api_url": f"{url}/api", "mlflow_url": url, "pid": GONE}))
        code, result, stderr = call(home, "sync")
        server.shutdown()
    assert (code, result["runs"]) == (0, [RUN]), stderr
    assert in_mlflow(home) == {RUN: ("FINISHED", [2.5, 1.5])}


# --- two at once -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("_round", [1, *(pytest.param(number, marks=pytest.mark.long) for number in range(2, 11))])
def test_two_verbs_make_one_home(tmp_path: Path, _round: int) -> None:
    """Both make MLflow's tables, which takes seconds."""
    ends: list[tuple[int, dict[str, Any], str]] = []
    both = [threading.Thread(target=lambda: ends.append(call(tmp_path / "new", "sync"))) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert [code for code, _, _ in ends] == [0, 0], ends


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """As a process at work in it has it."""
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


@pytest.mark.usefixtures("mlflow_store")
def test_second_night_is_cancelled(home: Path, small_text: Path) -> None:
    """It would train on the same text, and the ledger would keep one of both."""
    with claimed(home / "nightly" / "tiny"):
        code, result, stderr = call(
            home, "nightly", TINY, f"data.source={small_text}", "train.max_steps=2", "train.warmup_steps=1"
        )
    assert (code, "another night of tiny is at work" in result["error"]) == (75, True), stderr
    assert str(os.getpid()) in result["error"]
    assert not (home / "nightly" / "tiny" / "ledger.json").exists()
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        assert database.execute("select state_type from flow_run").fetchall() == [("CANCELLED",)]


# --- what the machine refuses ----------------------------------------------------------------------------------------------


def _as_anybody() -> None:
    """Root, too, is refused what a file's mode refuses, once it may not override it (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    drop_from_bounding_set = 24
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(drop_from_bounding_set, capability)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="capabilities are Linux's")
def test_read_only_home_is_one_sentence(home: Path, small_text: Path) -> None:
    home.mkdir()
    home.chmod(0o555)
    code, result, stderr = call(home, "data", TINY, f"data.source={small_text}", preexec_fn=_as_anybody)
    assert (code, str(home) in result.get("error", ""), "Traceback" in stderr) == (2, True, False), stderr
    assert list(home.iterdir()) == []


# --- files and values that fill the machine --------------------------------------------------------------------------------


def _of_aliases(line: str) -> str:
    """Each line ten times the one before: a few hundred bytes, ten to the power of nine values."""
    return "a0: &a0 {x: 1}\n" + "".join(line.format(n=n, before=", ".join([f"*a{n - 1}"] * 10)) for n in range(1, 10))


BOMBS = {
    "aliases": _of_aliases("a{n}: &a{n} [{before}]\n"),
    "merge keys": _of_aliases("a{n}: &a{n}\n  <<: [{before}]\n  k{n}: 1\n"),
    "levels": "train: " + "[" * 50_000,
    "a long list": "data: {source: [" + "a, " * 80_000 + "]}",
    "a long number": "train: {seed: 0x" + "f" * 100_000 + "}",
}


def _limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_that_fills_memory_is_refused(home: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMBS[name])
    code, result, stderr = call(home, "data", path, preexec_fn=_limited)
    assert (code, str(path) in result.get("error", ""), len(result.get("error", "")) < 1000) == (2, True, True), stderr[-2000:]


@pytest.mark.parametrize("value", ["[" * 20_000, "9" * 5_000], ids=["levels", "digits"])
def test_override_that_fills_memory_is_refused(home: Path, value: str) -> None:
    code, result, stderr = call(home, "data", TINY, f"train.seed={value}", preexec_fn=_limited)
    assert (code, len(result.get("error", "")) < 1000, "Traceback" in stderr) == (2, True, False), stderr[-2000:]


def test_tokenizer_of_millions_is_refused(home: Path, small_text: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    entries = ",".join(f'"{number:x}":{number}' for number in range(1_100_000))
    path.write_text('{"added_tokens":[],"model":{"type":"BPE","merges":[],"vocab":{' + entries + "}}}")
    code, result, stderr = call(home, "data", TINY, f"data.source={small_text}", f"vocab.source={path}", preexec_fn=_limited)
    assert (code, f"{path}: a vocabulary of more than" in result.get("error", "")) == (2, True), stderr[-2000:]

"""Databases prepared at installation: a home gets whole ones, its own are never touched, and both servers take them."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gptloom.flows.servers import databases
from gptloom.flows.servers.databases import place_databases, prepared
from gptloom.flows.servers.pools import prepare_pool

ROOT = Path(__file__).parent.parent


@pytest.fixture
def templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for the prepared files."""
    monkeypatch.setattr(databases, "FOLDER", tmp_path / "share")
    (tmp_path / "share").mkdir()
    for package in databases.PLACES:
        prepared(package).write_bytes(package.encode())
    return tmp_path / "share"


def test_a_new_home_gets_both_for_its_owner_only(home: Path, templates: Path) -> None:
    before = os.umask(0)
    try:
        home.mkdir()
        assert sorted(place_databases(home)) == ["mlflow", "prefect"]
    finally:
        os.umask(before)
    assert (home / "prefect" / "prefect.db").read_bytes() == b"prefect"
    assert {path.stat().st_mode & 0o777 for path in home.rglob("*.db")} == {0o600}
    assert sorted(path.name for path in home.rglob("*") if path.is_file()) == ["mlflow.db", "prefect.db"]


def test_what_is_there_stays(home: Path, templates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the history of all runs, also against a second command that makes the file between our look and our copy."""
    home.mkdir()
    (home / "mlflow.db").write_text("all my runs")
    assert place_databases(home) == ["prefect"]
    monkeypatch.setattr(Path, "exists", lambda _self: False)
    assert place_databases(home) == []
    assert (home / "mlflow.db").read_text() == "all my runs"


def test_of_another_version_or_for_servers_elsewhere_none_is_taken(
    home: Path, templates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables of an older Prefect would be migrated, those of a newer one refused: after an upgrade they are made as always."""
    home.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    prepared("prefect").rename(templates / "prefect-0.0.1.db")
    assert place_databases(home) == []
    assert list(home.iterdir()) == []


@pytest.mark.integration
def test_prepared_ones_are_empty_and_current(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ones: no rows that would make two homes look like one, and MLflow has no tables left to make."""
    monkeypatch.setattr(databases, "FOLDER", tmp_path / "share")
    made = databases.make_databases()
    assert made == databases.make_databases(), "made twice"
    for path in made:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            counts = {t: connection.execute(f'SELECT count(*) FROM "{t}"').fetchone()[0] for t in tables}
        assert len(tables) > 20
        assert {table for table, rows in counts.items() if rows} <= {"alembic_version", "workspaces"}, path
    home.mkdir()
    place_databases(home)
    code = "from gptloom.tasks.records.tracking import check_store, open_client; check_store(); print(open_client().search_experiments()[0].name)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"GPTLOOM_HOME": str(home)}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["Default"], done.stderr
    assert "Creating initial MLflow database tables" not in done.stderr


def test_pools_are_made_through_a_busy_database() -> None:
    """Prefect answers 503 while its SQLite file is locked: neither a pool that is missing nor a start that failed."""
    asked: list[str] = []

    class Busy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(503 if len(asked) % 2 else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_PATCH = do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        prepare_pool(f"http://127.0.0.1:{server.server_port}/api", "cpu", has_worker=True)
        server.shutdown()
    assert asked == ["GET /api/work_pools/cpu"] * 2 + ["PATCH /api/work_pools/cpu"] * 2

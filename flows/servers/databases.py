"""Prefect's and MLflow's tables, made once at installation: a new home copies two files instead of running 100 migrations.

    python -m gptloom.flows.servers.databases        # the last step of the installation; about ten seconds

The files lie in the environment, named after the versions that made them (share/gptloom/prefect-3.9.1.db), and hold tables but no
rows of anybody's. Without them, or after an upgrade that made none, the servers make their tables themselves as they always did.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from gptcore.entry import python_environment
from gptcore.store import write_once
from gptloom.tasks.records.tracking import check_store, mlflow_database, sqlite_url

FOLDER = Path(sys.prefix) / "share" / "gptloom"
PLACES = {"prefect": Path("prefect/prefect.db"), "mlflow": Path("mlflow.db")}  # below GPTLOOM_HOME
ELSEWHERE = {"prefect": "PREFECT_API_URL", "mlflow": "MLFLOW_TRACKING_URI"}  # who sets these has databases already


def prepared(package: str) -> Path:
    """Where the empty database of the installed version of a package is, once it was made."""
    return FOLDER / f"{package}-{version(package)}.db"


def prefect_database(home: Path) -> dict[str, str]:
    """Where Prefect's server has its database, where it would not find that itself: into its URL it pastes PREFECT_HOME as it is."""
    path = home / PLACES["prefect"]
    url = sqlite_url(path, "sqlite+aiosqlite")
    is_told = any(name.startswith(("PREFECT_SERVER_DATABASE_", "PREFECT_API_DATABASE_")) for name in os.environ)
    return {} if is_told or url.endswith(str(path)) else {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url}


def place_databases(home: Path) -> list[str]:
    """Give a home that has no databases yet the prepared ones, open to its owner only; returns the packages it did so for.

    A file that is there is never touched, also not one that another process makes at this very moment.
    """
    placed = []
    for package, place in PLACES.items():
        target = home / place
        if ELSEWHERE[package] in os.environ or target.exists():
            continue
        try:
            template = prepared(package).read_bytes()
        except OSError:  # not prepared, or not for us: the server makes its own
            continue
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if write_once(target, template):
            placed.append(package)
    return placed


def make_databases() -> list[Path]:
    """Make the files that `place_databases` copies; returns those that are there afterwards."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for package, make in {"prefect": _make_prefect, "mlflow": _make_mlflow}.items():
        target = prepared(package)
        if target.exists():
            continue
        with tempfile.TemporaryDirectory(prefix="gptloom-databases-") as folder:
            database, packed = Path(folder) / PLACES[package].name, Path(folder) / "packed.db"
            make(database)
            with contextlib.closing(sqlite3.connect(database)) as connection:
                connection.execute("VACUUM INTO ?", (str(packed),))  # one file, without a write-ahead log beside it
            beside = target.with_suffix(".new")
            shutil.copyfile(packed, beside)
            beside.replace(target)
    return [prepared(package) for package in PLACES]


def _make_prefect(database: Path) -> None:
    # Nothing of the user's settings: they may name the database of a server at work.
    environment = {name: value for name, value in python_environment().items() if not name.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(database.parent), "DO_NOT_TRACK": "1"}
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
    subprocess.run(command, env=environment, cwd=database.parent, stdout=subprocess.DEVNULL, check=True)


def _make_mlflow(database: Path) -> None:
    check_store(mlflow_database(database.parent))
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        # MLflow makes its experiment 0 at the first use, with a place for files that fits whoever uses it.
        connection.execute("DELETE FROM experiments")


def main() -> int:
    for path in make_databases():
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

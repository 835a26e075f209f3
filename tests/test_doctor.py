"""The doctor finds what is broken on purpose, names the remedy, and says so by its exit code."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from pathlib import Path

import pytest
from conftest import lock_of_up

from gptcore.journal import Journal
from gptcore.leftovers import find_leftovers, hold, sweep
from gptcore.store import commit_dir
from gptloom.flows.command import doctor
from gptloom.flows.command.cli import main
from gptloom.flows.command.doctor import FAIL, OK, WARN, Check


@pytest.fixture
def committed(home: Path) -> Path:
    """A shard set's place with a committed directory in it."""
    directory = home / "data" / "shards" / "0123"
    with commit_dir(directory, {"kind": "shards"}) as tmp:
        (tmp / "train_000000.bin").write_bytes(b"12345678")
    home.chmod(0o700)
    return directory


def of(home: Path, name: str, *, full: bool = False) -> list[Check]:
    return [check for check in doctor.examine(home, full=full) if check.name == name]


def test_all_is_well(home: Path, committed: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A doctor that finds fault with a healthy home is soon not asked any more."""
    monkeypatch.setattr(doctor, "LITTLE_GIB", 0.0)
    monkeypatch.setattr(doctor, "FULL_GIB", 0.0)
    assert main(["doctor"]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["ok"] is True
    names = {check["name"] for check in result["checks"]}
    assert {"python", "packages", "cpu", "gpu", "compiler", "disk", "permissions", "prefect", "mlflow", "data", "runs"} <= names
    assert len(err.splitlines()) == len(result["checks"])
    assert "data: 1 directories whole" in err


@pytest.mark.parametrize("full", [False, True])
def test_damaged_data_fails_with_a_remedy(home: Path, committed: Path, full: bool, capfd: pytest.CaptureFixture[str]) -> None:
    (committed / "train_000000.bin").write_bytes(b"12345679")  # the same size
    (check,) = of(home, "data", full=full)
    assert (check.status, "sha256" in check.message, str(committed) in check.remedy) == (FAIL, True, True)
    if full:
        assert main(["doctor", "--full"]) == 2
        assert json.loads(capfd.readouterr().out.splitlines()[-1])["ok"] is False


def test_large_data_is_hashed_on_request_only(home: Path, committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the line says what was not looked at."""
    monkeypatch.setattr(doctor, "HASHED_BYTES", 4)
    (committed / "train_000000.bin").write_bytes(b"12345679")
    (check,) = of(home, "data")
    assert (check.status, "0 hashed; --full" in check.message) == (OK, True)
    assert of(home, "data", full=True)[0].status == FAIL


def test_uncommitted_checkpoint_is_found(home: Path) -> None:
    directory = home / "runs" / "toy" / "train" / "checkpoints" / "step_000010"
    directory.mkdir(parents=True)
    (check,) = of(home, "checkpoints")
    assert (check.status, "not committed" in check.message) == (FAIL, True)


def test_other_versions_than_pinned_are_named(tmp_path: Path) -> None:
    """Prefect starts with the wrong fastapi, and then never fires a schedule."""
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# pins\nnumpy==0.0.1\nnot-installed-at-all==1.0\n")
    checks = [check for check in doctor.check_packages(constraints) if "pinned" in check.message]
    assert [(check.status, check.message.startswith("numpy")) for check in checks] == [(WARN, True)]
    assert "constraints.txt" in checks[0].remedy


def test_a_c_compiler_does_not_compile_for_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor was content with gcc, and the trainer, which needs C++ on a CPU, then ran uncompiled."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name in ("cc", "gcc", "g++"):
        (tmp_path / name).touch(mode=0o700)
    assert [check.status for check in doctor.check_compiler()] == [OK]
    (tmp_path / "g++").unlink()
    (check,) = doctor.check_compiler()
    assert check.status == WARN
    assert "no C++ compiler here (g++ or clang++)" in check.message
    assert "install g++" in check.remedy


def test_home_open_to_others(home: Path, committed: Path) -> None:
    home.chmod(0o777)
    assert of(home, "permissions")[0].status == FAIL
    home.chmod(0o755)
    assert of(home, "permissions")[0].status == WARN
    home.chmod(0o750)
    assert of(home, "permissions")[0].status == OK


def test_login_open_to_others(home: Path, committed: Path) -> None:
    (home / "login").write_text("gptloom:secret")
    for mode, expected in ((0o644, FAIL), (0o640, FAIL), (0o600, OK)):
        (home / "login").chmod(mode)
        assert of(home, "permissions")[-1].status == expected
        assert "secret" not in of(home, "permissions")[-1].message


def test_damaged_store(home: Path, committed: Path) -> None:
    path = home / "mlflow.db"
    with sqlite3.connect(path) as database:
        database.execute("create table t (a)")
    database.close()
    assert of(home, "mlflow store")[0].status == OK
    path.write_bytes(b"no database at all" * 100)
    (check,) = of(home, "mlflow store")
    assert (check.status, "journals" in check.remedy) == (FAIL, True)


def test_server_that_does_not_answer(home: Path, committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the password of its address left out."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    (check,) = of(home, "mlflow")
    assert (check.status, "hunter2" in check.message + check.remedy, "unset" in check.remedy) == (FAIL, False, True)
    (home / "servers.json").write_text(json.dumps({"prefect_api_url": "http://127.0.0.1:9/api", "pid": 2**22 + 1}))
    with lock_of_up(home):
        assert of(home, "prefect")[0].status == FAIL
    assert of(home, "prefect")[0].status == OK, "nobody is up; whoever listens there now is a stranger"
    assert of(home, "servers")[0].status == WARN


def test_dead_and_living_runs(home: Path, committed: Path) -> None:
    """Known by the lock alone: no guess by age."""
    journal = Journal(home / "runs" / "toy-1")
    journal.open("toy-1")
    assert "1 under way, none dead" in of(home, "runs")[0].message
    os.close(journal._fd)  # what a kill does
    journal._fd = -1
    (check,) = of(home, "runs")
    assert (check.status, "toy-1" in check.message, "reconcile" in check.remedy) == (WARN, True, True)


def test_leftovers_are_swept_but_not_a_living_builders(home: Path) -> None:
    """A killed build leaves gigabytes; a second build must not delete the first one's work under its hands."""
    folder = home / "data" / "segments"
    for name in (".dead.tmp", ".living.tmp", ".new.tmp", "0123"):
        (folder / name).mkdir(parents=True)
        (folder / name / "documents.parquet").write_text("x")
    (folder / ".old.1.tmp").write_text("a download")
    (folder / ".young.1.tmp").write_text("a download")
    long_ago = time.time() - 100_000
    for name in (".dead.tmp", ".living.tmp", "0123", ".old.1.tmp"):
        os.utime(folder / name, (long_ago, long_ago))
    fd = hold(folder / ".living.tmp")
    assert [path.name for path in find_leftovers(folder)] == [".dead.tmp", ".old.1.tmp"]
    with commit_dir(folder / "4567", {}) as tmp:  # the next build sweeps
        os.utime(tmp, (long_ago, long_ago))
        assert sweep(folder) == []
    assert sorted(path.name for path in folder.iterdir()) == [".living.tmp", ".new.tmp", ".young.1.tmp", "0123", "4567"]
    os.close(fd)
    assert [path.name for path in sweep(folder)] == [".living.tmp"]


def test_a_check_that_breaks_is_a_failed_check(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One surprise must not hide all other findings."""
    monkeypatch.setattr(doctor, "check_compiler", lambda: [].pop())
    checks = list(doctor.examine(home))
    assert [check.status for check in checks if check.name == "compiler"] == [FAIL]
    assert checks[-1].name == "records"


def test_closed_directory_hides_no_other(home: Path, committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that root made with another umask: it is named as it is, and the damaged one beside it too."""
    (committed / "train_000000.bin").write_bytes(b"12345679")
    closed = home / "data" / "vocabs" / "4567"
    closed.mkdir(parents=True)
    real = os.scandir

    def refuse(path: Path | str = ".") -> object:
        if str(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(closed))
    first, second = doctor.check_files("data", [home / "data"], full=False)
    assert (first.status, f"{closed}: permission denied" in first.message, "readable" in first.remedy) == (FAIL, True, True)
    assert (second.status, str(committed) in second.message) == (FAIL, True)


def test_every_committed_directory_is_looked_at(home: Path) -> None:
    """Those of nights, studies and the registry too."""
    trainings = ("runs/night/arms/a", "studies/trainings/0123")
    places = [*(f"{training}/checkpoints/step_000002" for training in trainings), "studies/cells/0123", "registry/toy/1"]
    for place in places:
        with commit_dir(home / place, {}) as tmp:
            (tmp / "weights").write_bytes(b"12345678")
    (check,) = of(home, "checkpoints", full=True)
    assert (check.status, check.message[:20]) == (OK, "4 directories whole ")
    for place in places:
        (home / place / "weights").write_bytes(b"12345679")
    found = " ".join(check.message for check in of(home, "checkpoints", full=True) if check.status == FAIL)
    assert [place for place in places if place not in found] == []


def test_journal_that_may_not_be_read_hides_no_dead_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        journal = Journal(home / "runs" / name)
        journal.open(name)
        os.close(journal._fd)
        journal._fd = -1
    real = doctor.unfinished_run

    def refuse(directory: Path) -> object:
        if directory.name == "a":
            raise PermissionError(13, "Permission denied", str(directory / "journal.jsonl"))
        return real(directory)

    monkeypatch.setattr(doctor, "unfinished_run", refuse)
    first, second = doctor.check_runs(home)
    assert (first.status, "runs/a/journal.jsonl: permission denied" in first.message) == (FAIL, True)
    assert (second.status, "died without a word: b" in second.message) == (WARN, True)


def test_store_whose_index_lacks_rows(home: Path, committed: Path) -> None:
    """Its pages are all well, and a search by that index finds less than there is."""
    path = home / "mlflow.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.executescript(
            "create table t (a); create index i on t (a); insert into t values (1), (2), (3); pragma writable_schema = on"
        )
        database.execute("create index empty on t (a) where a > 9")
        root = dict(database.execute("select name, rootpage from sqlite_master"))
        database.execute("update sqlite_master set rootpage = ? where name = 'i'", (root["empty"],))
        database.execute("update sqlite_master set rootpage = ? where name = 'empty'", (root["i"],))
    (check,) = of(home, "mlflow store")
    assert (check.status, str(path) in check.message, "index" in check.message) == (FAIL, True, True)

"""The command contract: one JSON object as stdout's last line, exit codes, one sentence for a mistake, help that explains."""

from __future__ import annotations

import ast
import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.exceptions import CancelledRun

from gptcore.config import ExperimentConfig, UserError
from gptcore.errors import DeviceMemoryError, NonFinite, Stopped, describe_error, exit_code
from gptcore.locks import is_held, read_holder
from gptloom.flows.command import arguments, cli, surroundings
from gptloom.flows.command.surroundings import quiet_expected_errors
from gptloom.tasks.records.login import CLIENT_VARIABLE

ROOT = Path(__file__).parent.parent
SMOKE = "name: smoke\n"


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "smoke.yaml"
    path.write_text(SMOKE)
    return path


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, last line of stdout as JSON, stderr."""
    try:
        code = cli.main([str(arg) for arg in argv])
    except SystemExit as error:
        code = int(error.code or 0)
    out, err = capsys.readouterr()
    return code, json.loads(out.strip().splitlines()[-1]), err


def test_mistakes_cost_exit_2_and_write_nothing(
    experiment: Path, home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each is found before Prefect or MLflow is started, so it takes a moment and leaves no state behind."""
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\0\xff\xfe" * 50)
    (tmp_path / "folder").mkdir()
    mistakes = {
        ("run", tmp_path / "none.yaml"): "none.yaml",
        ("run", experiment, "train.max_step=3"): "max_steps",
        ("run", experiment, "train.max_steps=many"): "train.max_steps",
        ("run", experiment, "model.n_head=3"): "model.n_embd",
        ("run", experiment, "nonsense"): "section.field=value",
        ("run", experiment, f"data.source={tmp_path}/none.txt"): "none.txt",
        ("run", experiment, f"data.source={tmp_path}/empty.txt"): "empty.txt",
        ("run", experiment, f"data.source={tmp_path}/binary.txt"): "UTF-8",
        ("run", experiment, f"data.source={tmp_path}/folder"): "folder",
        ("run",): "EXPERIMENT.yaml",
        ("up", "--prefect-port", "-1"): "--prefect-port -1: ",
        ("up", "--prefect-port", "0"): "--prefect-port 0: ",
        ("up", "--mlflow-port", "99999"): "--mlflow-port 99999: ",
        ("nightly", "--simulate", "0"): "--simulate 0: ",
        ("nightly", "--simulate", "-3"): "--simulate -3: ",
        ("fly",): "fly",
    }
    for argv, word in mistakes.items():
        code, result, err = call(capfd, *map(str, argv))
        assert (code, list(result)) == (2, ["error"]), argv
        assert word in result["error"], argv
        assert "Traceback" not in err
        assert "error: " in err
    assert not home.exists(), "a refused call wrote into GPTLOOM_HOME"


def test_unreachable_servers_are_named(
    experiment: Path, small_text: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    code, result, _ = call(capfd, "run", str(experiment), f"data.source={small_text}")
    assert code == 2
    assert "PREFECT_API_URL=http://127.0.0.1:9/api" in result["error"]
    monkeypatch.delenv("PREFECT_API_URL")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, result, _ = call(capfd, "run", str(experiment), f"data.source={small_text}")
    assert code == 2
    assert "http://127.0.0.1:9" in result["error"]
    assert "MLFLOW_TRACKING_URI" in result["error"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("data.source=x: no"), 2),
        (OSError(28, "No space left on device", "shard.bin"), 2),
        (OSError(24, "Too many open files", "shard.bin"), 2),
        (OSError(30, "Read-only file system", "shard.bin"), 2),
        (PermissionError(13, "Permission denied", "shard.bin"), 2),
        (Stopped("stopped at step 3"), 75),
        (KeyboardInterrupt(), 75),
        (CancelledRun("stopped by the user"), 75),
        (NonFinite("loss nan"), 76),
        (DeviceMemoryError("too large"), 77),
        (ZeroDivisionError("a bug"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_exit_codes(
    error: BaseException,
    code: int,
    experiment: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Scripts branch on them; only a bug shows its traceback. A run's name survives its failure."""

    def fail(_args: object, result: dict[str, Any]) -> int:
        result["run"] = "smoke-1"
        print("noise on stdout")
        os.write(1, b"noise of a child process\n")
        raise error

    monkeypatch.setattr(arguments, "run_experiment", fail)
    got, result, err = call(capfd, "run", str(experiment))
    assert got == code
    assert set(result) == {"run", "error"}
    assert "noise on stdout" in err
    assert "noise of a child process" in err
    assert bool(caplog.records) == (code == 1)


def test_stdout_holds_one_line_only(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def work(_args: object, result: dict[str, Any]) -> int:
        subprocess.run([sys.executable, "-c", "print('chatty library')"], check=True)
        result["run"] = "ü"
        return 0

    monkeypatch.setattr(arguments, "run_experiment", work)
    assert cli.main(["run", str(experiment)]) == 0
    assert capfd.readouterr().out == '{"run": "ü"}\n'


def test_sigterm_ends_as_ctrl_c_does(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Docker, systemd and `kill` send SIGTERM: children must be stopped and runs closed then too."""

    def wait(_args: object, result: dict[str, Any]) -> int:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        threading.Event().wait(10)
        return 0

    monkeypatch.setattr(arguments, "run_experiment", wait)
    code, result, _ = call(capfd, "run", str(experiment))
    assert (code, result) == (75, {"error": "stopped on request"})


def test_help_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for section, info in ExperimentConfig.model_fields.items():
        for name, field in getattr(info.annotation, "model_fields", {}).items():
            assert f"{section}.{name}" in text
            assert " ".join((field.description or "").split()) in text


def test_up_and_down_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptloom.flows.servers import stack as servers

    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(servers, "up", lambda *args: calls.append(args) or 0)
    monkeypatch.setattr(servers, "down", lambda *args: calls.append(args) or 3)
    assert cli.main(["up", "--mlflow-port", "5001"]) == 0
    assert cli.main(["down"]) == 3
    assert calls == [("127.0.0.1", 4200, 5001, True), ()]


def test_old_python_gets_a_sentence() -> None:
    """The guard must stand before the first import that an old Python lacks, in syntax that an old Python reads."""
    tree = ast.parse((ROOT / "flows" / "command" / "cli.py").read_text(), feature_version=(3, 8))
    guard = next(i for i, node in enumerate(tree.body) if isinstance(node, ast.If))
    before = {alias.name for node in tree.body[:guard] if isinstance(node, ast.Import) for alias in node.names}
    assert before == {"json", "sys"}
    code = "import sys; sys.version_info = (3, 8); sys.version = '3.8.1 (old)'; import gptloom.flows.command.cli"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "found 3.8.1" in json.loads(done.stdout)["error"]


@contextlib.contextmanager
def root_handler(handler: Any) -> Iterator[None]:
    import logging

    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def test_expected_errors_are_kept_out_of_the_terminal() -> None:
    """Prefect logs a traceback for every failing task; a bug's must stay, a mistake's must go."""
    import io
    import logging

    stream = io.StringIO()
    with root_handler(logging.StreamHandler(stream)):
        quiet_expected_errors()
        for error in (UserError("yours"), OSError(errno.ENOSPC, "the disk"), ZeroDivisionError("ours")):
            try:
                raise error
            except Exception:
                logging.getLogger("prefect.task_runs").exception("Task run failed")
    assert "yours" not in stream.getvalue()
    assert "the disk" not in stream.getvalue()
    assert "ZeroDivisionError: ours" in stream.getvalue()


def test_what_the_machine_refuses_is_one_sentence_that_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may not read a file is not helped by making it writable; a read that fails names no file."""
    file, folder = tmp_path / "a.txt", tmp_path / "closed"
    file.touch()
    folder.mkdir()
    allowed = os.W_OK
    monkeypatch.setattr(os, "access", lambda path, mode: mode & allowed == mode)  # root may do everything
    for path in (file, folder, folder / "b.txt"):
        error = PermissionError(13, "Permission denied", str(path))
        assert describe_error(error).startswith(f"{path}: permission denied; make it readable")
    allowed = os.R_OK | os.X_OK
    for path in (file, folder, folder / "b.txt"):
        assert "; make it writable" in describe_error(PermissionError(13, "Permission denied", str(path)))
    for number in (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE):
        error = OSError(number, os.strerror(number))
        assert (exit_code(error), describe_error(error).startswith(f"{error.strerror.lower()}; ")) == (2, True)
    assert exit_code(PermissionError(1, "Operation not permitted")) == 1, "of a process or a port, and no file"


def test_where_no_file_can_be_nobody_holds_one(tmp_path: Path) -> None:
    """A file in a run's place was said to be at work."""
    (tmp_path / "run").touch()
    assert not is_held(tmp_path / "run" / "metrics.jsonl")
    assert read_holder(tmp_path / "run" / ".lock") is None


def test_second_temporary_server_waits_for_the_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the database is there: two that start on it write the same block types, and one of them fails."""
    home.joinpath("prefect").mkdir(parents=True)
    home.joinpath("prefect", "prefect.db").touch()
    for name in ("PREFECT_API_URL", "PREFECT_UI_URL", CLIENT_VARIABLE):
        monkeypatch.setenv(name, "")  # to be put back
    monkeypatch.setattr(surroundings.subprocess, "Popen", lambda *_, **__: None)
    monkeypatch.setattr(surroundings.atexit, "register", lambda _: None)
    monkeypatch.setattr(surroundings, "_servers", [])
    monkeypatch.setattr(surroundings, "_reapers", [])
    surroundings.launch_prefect_server()
    lock = home / "prefect" / ".prefect.db.lock"
    assert is_held(lock)
    surroundings._servers.clear()  # it answers
    surroundings.start_prefect_server()
    assert not is_held(lock)

"""Whatever lies in the folder that we are started in, our processes import none of it: a user's `random.py` is theirs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from gptcore.corpus.package_index import pip_settings
from gptcore.entry import python_environment
from gptcore.errors import EXIT_USER
from gptcore.studies.__main__ import run_parts
from gptloom.tasks.runtime import launcher

NAMES = ("random.py", "gptcore/__init__.py", "gptloom/__init__.py", "flows/__init__.py", "tasks/__init__.py")
TINY = ["model.n_layer=1", "model.n_embd=32", "train.max_steps=4", "train.warmup_steps=1", "train.eval_tokens=512"]
NO_STUDIES = [f"studies.{name}=false" for name in ("floor", "timing", "quantization", "accumulation", "rnn")]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with files of our names and of the standard library's that end whoever imports them."""
    folder = tmp_path / "working"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("raise SystemExit(f'{__file__} was imported')\n")
    monkeypatch.chdir(folder)
    for name in [name for name in os.environ if name.startswith("PYTHON")]:
        monkeypatch.delenv(name)
    return folder


@pytest.mark.integration
@pytest.mark.parametrize("forks", [True, False])
def test_a_step(tmp_path: Path, forks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to start one; what it is told is a mistake, which it can only say once it has its imports."""
    if not forks:
        monkeypatch.setattr(launcher, "_fork_server", lambda module="": None)
    with open(tmp_path / "log.txt", "wb") as log:
        child = launcher.start_process(["gptcore.evaluate", "nowhere"], log)
    assert child.wait() == EXIT_USER, (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("options", [["-m"], ["-u", "-m"], ["-P", "-m"]])
def test_the_library_called_by_hand(options: list[str]) -> None:
    """Without -P, Python puts the working folder first; a gptcore there is whose the call is, anything else is not."""
    for name in NAMES[1:]:
        Path(name).unlink()
        Path(name).parent.rmdir()
    called = subprocess.run([sys.executable, *options, "gptcore.config", "nowhere.yaml"], capture_output=True, text=True)
    assert "random.py was imported" not in called.stderr
    assert called.returncode == EXIT_USER, called.stderr


@pytest.mark.integration
def test_a_part_of_a_study(tmp_path: Path) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(RuntimeError, match=r"exit codes \[2, 2\]"):
            run_parts(tmp_path / "nowhere.yaml", tmp_path, tmp_path, "toy", 2)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_pip_is_asked_for_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_TIMEOUT", "17")
    assert pip_settings()["timeout"] == "17"


def test_gptcore_is_found_where_we_found_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout that is not installed, on a bare training box; a folder of Python's own stays behind the standard library."""
    root = str(ROOT)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert python_environment()["PYTHONPATH"].split(os.pathsep) == [root, "/elsewhere"]
    monkeypatch.setattr("site.getsitepackages", lambda: [root])
    assert python_environment()["PYTHONPATH"] == "/elsewhere"


@pytest.mark.integration
def test_ranks() -> None:
    code = "from gptcore.launch import launch; raise SystemExit(launch('gptcore.evaluate', ['nowhere'], 2))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == EXIT_USER, done.stderr


@pytest.mark.integration
def test_a_run(home: Path, small_text: Path) -> None:
    """The whole pipeline: Prefect's temporary server, the warden, readers of the corpus, the steps."""
    (Path.cwd() / "toy.yaml").write_text("train: {global_batch_size: 8}\nevaluate: {samples: 1, bootstrap: 0}\n")
    settings = [f"data.source={small_text}", "data.processes=2", *TINY, *NO_STUDIES]
    command = [sys.executable, "-P", "-m", "gptloom.flows.command.cli", "run", "toy.yaml", *settings]
    done = subprocess.run(command, env=os.environ | {"GPTLOOM_HOME": str(home)}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout.splitlines()[-1])["report"]).is_file()

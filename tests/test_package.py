"""What `pip install gptloom` gives to who has no checkout: the wheel in an environment of its own, a project, a run by deployment.

.venv/bin/pytest tests/test_package.py        # about a minute
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_servers import running_stack

from gptloom import find_project
from gptloom.flows.command.cli import main
from gptloom.flows.servers import databases

pytestmark = pytest.mark.integration
SOURCES = ("gptcore", "gptloom", "flows", "tasks", "experiments")
TINY = {
    "max_steps": 10,
    "n_layer": 1,
    "n_embd": 32,
    "global_batch_size": 8,
    **dict.fromkeys(["floor", "timing", "quantization", "accumulation", "rnn"], False),
    "more": ["train.eval_tokens=512", "train.warmup_steps=2", "evaluate.bootstrap=0", "evaluate.samples=1"],
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a build folder beside what it builds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        str(out),
        str(source),
    ]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("gptloom-*.whl"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """An environment with the wheel, whose other packages are ours; nothing of this checkout can be seen from it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    # Installed before the others come into view: pip would take an editable gptloom there for an older one, and uninstall it.
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-index", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    packages = [path for path in sys.path if path.endswith("site-packages")]
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "packages.pth").write_text("\n".join(packages) + "\n")
    if databases.FOLDER.exists():  # else the servers make their tables, which takes longer
        shutil.copytree(databases.FOLDER, folder / "share" / "gptloom")
    where = "import gptloom, gptcore, json; print(json.dumps([gptloom.__file__, gptcore.__file__]))"
    found = json.loads(subprocess.check_output([str(python), "-c", where], cwd=folder, text=True))
    assert found == [str(site / name / "__init__.py") for name in ("gptloom", "gptcore")]
    return folder


def test_wheel_brings_two_packages(wheel: Path) -> None:
    """A top-level `flows` or `tasks` would answer to the name of a user's own."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gptcore", "gptloom"}
    experiments = {str(path.relative_to(ROOT)) for path in (ROOT / "experiments").rglob("*.yaml")}
    assert {f"gptloom/{name}" for name in experiments} <= set(names)


@pytest.mark.timeout(600)  # a first start of everything, where other work may go on beside it
def test_a_run_by_deployment_in_a_project_of_the_wheel(environment: Path, tmp_path: Path, small_text: Path) -> None:
    """Beside a `flows/` and a `random.py` of the user's own, which are none of our business."""
    program, project = str(environment / "bin" / "gptloom"), tmp_path / "project"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    outside = subprocess.run([program, "up"], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert outside.returncode == 2
    assert "`gptloom init DIR`" in outside.stderr
    made = subprocess.run([program, "init", str(project)], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True)
    assert json.loads(made.stdout)["project"] == str(project)
    for file in ("random.py", "sitecustomize.py", "flows/__init__.py", "flows/pipeline.py", "gptcore/__init__.py"):
        (project / file).parent.mkdir(exist_ok=True)
        (project / file).write_text("raise RuntimeError(__file__)\n")
    (project / "experiments" / "mine.yaml").write_text((project / "experiments" / "smoke.yaml").read_text())
    home = tmp_path / "up"
    home.mkdir()
    with running_stack(home, folder=project, program=(program,)) as stack:
        form = stack.deployment("pipeline/smoke")["parameter_openapi_schema"]
        assert "experiments/mine.yaml" in json.dumps(form)
        parameters = {"experiment": "experiments/mine.yaml", "overrides": {"data_source": str(small_text), **TINY}}
        stack.wait_for_run(stack.start_run("pipeline/smoke", parameters), {"COMPLETED"}, 120)
        for entry in yaml.safe_load((project / "prefect.yaml").read_text())["deployments"]:
            flow = entry["entrypoint"].rpartition(":")[2]
            assert stack.deployment(f"{flow}/{entry['name']}")["entrypoint"] == entry["entrypoint"]
    assert list(home.glob("runs/*/report.html"))


# --- gptloom init --------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    assert main(["init", str(tmp_path / "project")]) == 0
    return tmp_path / "project"


def test_project_names_modules_and_installs_the_package(project: Path) -> None:
    """Both are made of the checkout's files: a line that is not found there would be left as it is."""
    ours, theirs = (yaml.safe_load((folder / "prefect.yaml").read_text()) for folder in (ROOT, project))
    (step,) = ours["pull"]
    step["prefect.deployments.steps.set_working_directory"]["directory"] += "/experiments"
    for entry in ours["deployments"]:
        entry["entrypoint"] = entry["entrypoint"].replace("flows/", "gptloom.flows.").replace(".py:", ":")
    assert theirs == ours
    dockerfile = (project / "Dockerfile").read_text()
    assert "COPY constraints.txt *.whl ./" in dockerfile
    assert "gptloom==0.1.0" in dockerfile
    assert "pyproject" not in dockerfile
    assert dockerfile.splitlines()[-5:] == (ROOT / "Dockerfile").read_text().splitlines()[-5:]


def test_project_is_found_from_inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    assert find_project() == project
    monkeypatch.chdir(project.parent)
    assert find_project() == ROOT  # the checkout that these tests run from


def test_new_files_have_ordinary_modes(project: Path) -> None:
    """The command keeps its own files from others; a project is shared as any folder."""
    assert {path.stat().st_mode & 0o777 for path in [project, *project.rglob("*")] if path.is_dir()} == {0o755}
    assert {path.stat().st_mode & 0o777 for path in project.rglob("*") if path.is_file()} == {0o644}


def test_init_takes_an_empty_folder_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".git").mkdir()
    assert main(["init", str(tmp_path)]) == 0
    assert main(["init", str(tmp_path)]) == 2
    assert "holds " in json.loads(capfd.readouterr().out.splitlines()[-1])["error"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").touch()
    assert main(["init", str(other)]) == 2
    assert main(["init", str(tmp_path / "no" / "parent")]) == 2
    assert main(["init", str(other / "mine.txt")]) == 2
    assert [path.name for path in other.iterdir()] == ["mine.txt"]


def test_init_leaves_nothing_behind_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptloom.flows.command.init.version", lambda _: 1 / 0)
    for folder in (tmp_path / "new", tmp_path):
        assert main(["init", str(folder)]) == 1
        assert not list(tmp_path.iterdir())

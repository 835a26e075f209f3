"""What surrounds the code: pins, the Makefile, prefect.yaml, docker-compose.yml.

.venv/bin/pytest tests/test_setup.py
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import LONGEST, forms, pytest_collection_modifyitems
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.]+)")


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    matches = [PIN.fullmatch(line) for line in lines if line and not line.startswith("#")]
    assert all(matches), "constraints.txt holds something else than NAME==VERSION (an index, a range, a path)"
    return {canonicalize_name(match[1]): match[2] for match in matches if match}


@pytest.fixture(scope="module")
def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    found = [Requirement(text) for text in project["dependencies"] + [text for extra in extras.values() for text in extra]]
    return [requirement for requirement in found if requirement.name != project["name"]]  # dev asks for our other extras


def test_every_requirement_is_pinned_within_its_bounds(pins, requirements):
    """A bound that its own pin breaks makes the first `make run` fail in pip's resolver."""
    for requirement in requirements:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


AUDIT = {"cyclonedx-bom", "pip-audit"}


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_what_requirements_require_is_pinned_too(pins, requirements):
    """An indirect package without a pin: the set changes from one day to the next."""
    queue, seen = [*requirements], set()
    pins = pins | {"pip": ""}  # pip-audit's; the one that does the installing, in every environment
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        extras = {""} | requirement.extras
        if (name, frozenset(extras)) in seen:
            continue
        seen.add((name, frozenset(extras)))
        assert name in pins, f"{name} is installed but not in constraints.txt"
        if name in AUDIT and not is_installed(name):
            continue  # `make audit` installs it
        for text in importlib.metadata.distribution(name).requires or []:
            further = Requirement(text)
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(further)
    assert len(seen) > 100


@pytest.fixture
def bare_checkout(tmp_path, monkeypatch):
    """The files that `make` reads, in a folder of their own; `make test` must not pass its own flags on to it."""
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON"):
        monkeypatch.delenv(name, raising=False)
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("version", ["(3, 10, 14)", "(3, 14, 0)"])
def test_make_names_the_python_it_needs(version, bare_checkout):
    """Too old or too new a Python must end in one sentence, before pip's page of errors and before .venv exists."""
    fake = bare_checkout / "python"
    code = (
        f"import sys; sys.version_info = {version}; sys.version = '.'.join(map(str, {version})) + ' (fake)'; exec(sys.argv[1])"
    )
    fake.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$2"\n')
    fake.chmod(0o755)
    result = subprocess.run(["make", "run", f"PYTHON={fake}"], cwd=bare_checkout, capture_output=True, text=True)
    found = version.strip("()").replace(", ", ".")
    assert result.returncode != 0
    assert f"gptloom needs Python 3.11 to 3.13, found {found}" in result.stderr
    assert not (bare_checkout / ".venv").exists()


def test_second_make_installs_nothing(bare_checkout):
    """Once the stamp is newer than the two files it depends on, pip must not run again; an older one must run it."""
    stamp = bare_checkout / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    plan = ["make", "--dry-run", "run"]
    again = subprocess.run(plan, cwd=bare_checkout, capture_output=True, text=True, check=True)
    assert again.stdout.split("\n") == [".venv/bin/gptloom run experiments/shakespeare.yaml", ""]
    os.utime(stamp, (0, 0))
    outdated = subprocess.run(plan, cwd=bare_checkout, capture_output=True, text=True, check=True)
    assert "pip install" in outdated.stdout


def test_tests_in_containers_are_not_passed_in_silence(bare_checkout):
    """A tier that does not exist yet must not look like one that passed."""
    result = subprocess.run(["make", "test-stack"], cwd=bare_checkout, capture_output=True, text=True)
    assert result.returncode == 2
    assert "test-stack: the tests that need containers" in result.stderr


@pytest.mark.parametrize(("asked", "left"), [("", [0]), ("not integration", [0]), ("long", [0, 1, 2])])
def test_long_forms_run_only_where_they_are_asked_for(asked, left):
    """In `make test` they would cost an hour; left out of `make test-long`, nobody would ever run them."""
    marks = [[]] + [value.marks for value in forms(short=[0], long=[1, 2])[1:]]

    def item(number):
        found = {mark.name: mark for mark in marks[number]}
        return SimpleNamespace(name=number, path=Path("test_toy.py"), get_closest_marker=found.get)

    items = [item(number) for number in range(3)]
    hook = SimpleNamespace(pytest_deselected=lambda items: None)
    pytest_collection_modifyitems(SimpleNamespace(option=SimpleNamespace(markexpr=asked), hook=hook), items)
    assert [item.name for item in items] == left  # what `-m` itself leaves out, pytest does


def test_files_that_are_begun_first_exist():
    """A renamed one would be begun last, and keep one worker busy alone."""
    names = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert names >= set(LONGEST)


def test_deployments_point_at_what_exists():
    """A renamed flow or experiment file is seen only when the nightly run fails, unless it is seen here."""
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    assert {"shakespeare", "smoke", "budget", "data", "train", "evaluate", "nightly", "promote", "rollback"} <= {
        deployment["name"] for deployment in deployments
    }
    for deployment in deployments:
        path, name = deployment["entrypoint"].split(":")
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), deployment["name"]
        parameters = deployment["parameters"]
        file = parameters.get("experiment") or (
            f"experiments/studies/{parameters['name']}.yaml" if "name" in parameters else None
        )
        assert file is None or (ROOT / file).is_file(), deployment["name"]
        assert deployment["description"].endswith((".", "?")), deployment["name"]
        assert deployment["tags"], deployment["name"]
        assert deployment["work_pool"]["name"] in ("cpu", "gpu")  # the pools `gptloom up` makes


def test_nightly_has_a_zone_and_never_runs_twice_at_once():
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    nightly = next(deployment for deployment in deployments if deployment["name"] == "nightly")
    assert nightly["concurrency_limit"]["limit"] == 1
    for schedule in nightly["schedules"]:
        assert schedule["cron"]
        assert schedule["timezone"]
        assert schedule["active"] is True


def test_compose_publishes_on_loopback_only():
    """MLflow has no login: a port without an address in front would open it to the network."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert len(published) == 2
    assert all(port.startswith("127.0.0.1:") for port in published), published


def test_compose_file_is_valid():
    """A typo in a key or a missing variable; `.env.example` must name every variable the file needs."""
    command = shutil.which("docker-compose")
    if command is None:
        reason = "docker-compose is not installed"
        pytest.fail(reason) if os.environ.get("GPTLOOM_REQUIRE_SERVICES") == "1" else pytest.skip(reason)
    known = [line.split("=")[0] for line in (ROOT / ".env.example").read_text(encoding="utf-8").splitlines() if "=" in line]
    env = {key: value for key, value in os.environ.items() if key not in known}
    check = [command, "--env-file", str(ROOT / ".env.example"), "-f", str(ROOT / "docker-compose.yml"), "config", "-q"]
    result = subprocess.run(check, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

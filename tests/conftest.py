"""What several test files share: a home of one's own, a migrated MLflow database, one Prefect server, and honest skips."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

# A test run started in the background has SIGINT ignored, and tests of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
REQUIRE_VARIABLE = "GPTLOOM_REQUIRE_SERVICES"  # set to 1 in CI, where a missing service is a failure

os.environ["OMP_NUM_THREADS"] = "1"  # toy models: a second thread only waits for the first

# Prefect reads its settings once per process, at its import by the first test file: nothing may reach a server or a home of the user.
_prefect_home = tempfile.TemporaryDirectory(prefix="gptloom-tests-")
os.environ.update(
    PREFECT_HOME=_prefect_home.name, PREFECT_SERVER_ANALYTICS_ENABLED="false", DO_NOT_TRACK="1", MLFLOW_DISABLE_TELEMETRY="true"
)
for _name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_URI"):
    os.environ.pop(_name, None)


def forms(short: Iterable[Any], long: Iterable[Any]) -> list[Any]:
    """The values of a test's parameter: those of its short form (`make test`) and those that its long form adds (`make test-long`)."""
    return [*short, *(pytest.param(value, marks=pytest.mark.long) for value in long)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long forms run only where `-m` asks for them."""
    if "long" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.fixture(autouse=True)
def _imports_are_no_garbage() -> None:
    """A trainer collects garbage: not among the hundreds of thousands of objects that the imports of all tests have left."""
    gc.freeze()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty GPTLOOM_HOME for every test."""
    path = tmp_path / "home"
    monkeypatch.setenv("GPTLOOM_HOME", str(path))
    return path


@pytest.fixture(scope="session")
def _migrated_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One SQLite file with MLflow's tables: making them takes over a second, copying the file nothing."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments(max_results=1)
    return path


@pytest.fixture
def mlflow_store(home: Path, _migrated_mlflow: Path) -> str:
    """The URI of an empty MLflow store at its default place in this test's home."""
    home.mkdir(parents=True, exist_ok=True)
    shutil.copy(_migrated_mlflow, home / "mlflow.db")
    return f"sqlite:///{home / 'mlflow.db'}"


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server with a temporary database, about ten seconds once per session; for integration tests only."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 kB of made-up English-like prose in paragraphs, the same every time."""
    rng = random.Random(0)
    vowels = {"b": "aeio", "d": "aeio", "k": "ae", "l": "aeio", "m": "aeio", "n": "aeo", "r": "aeio", "s": "aeo", "t": "aeo"}
    syllables = [consonant + vowel for consonant in vowels for vowel in vowels[consonant]]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(400)]
    paragraphs: list[str] = []
    while sum(map(len, paragraphs)) < 60_000:
        sentences = (" ".join(rng.choices(words, k=rng.randint(4, 12))).capitalize() for _ in range(rng.randint(2, 6)))
        paragraphs.append(". ".join(sentences) + ".\n\n")
    path = tmp_path_factory.mktemp("text") / "small.txt"
    path.write_text("".join(paragraphs), encoding="utf-8")
    return path


def require(binary: str, reason: str) -> str:
    """The path of a program that a test needs; without it the test is skipped, or fails where CI promised the program."""
    path = shutil.which(binary)
    if path is None:
        message = f"{binary} is not installed: {reason}"
        if os.environ.get(REQUIRE_VARIABLE) == "1":
            pytest.fail(f"{message} ({REQUIRE_VARIABLE}=1)")
        pytest.skip(message)
    return path

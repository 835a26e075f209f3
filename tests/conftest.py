"""What several test files share: a home of one's own, a migrated MLflow database, one Prefect server, and honest skips."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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


# The files that take longest, longest first: begun last, one of them would keep one worker busy while the others have nothing to do.
LONGEST = [
    "test_servers",
    "test_nightly",
    "test_logins",
    "test_pipeline",
    "test_kill",
    "test_study_verb",
    "test_model_studies",
    "test_ranks_die",
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long forms run only where `-m` asks for them; long files come first."""
    if "long" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


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


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """`refuse(path, number)`: from now on the system answers the opening of that file so, and nothing is remembered of its bytes."""
    from gptcore import store

    def start(path: Path, number: int) -> None:
        def opened(file: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(file, int) and os.fspath(file) == str(path):
                raise OSError(number, os.strerror(number), str(path))
            return real(file, *args, **kwargs)

        real = open
        monkeypatch.setattr(store, "_known", {})
        monkeypatch.setattr("builtins.open", opened)
        monkeypatch.setattr("io.open", opened)

    return start


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
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    # At its end a flow waits for the thread of its heartbeats, which sleeps a second at a time.
    with prefect_test_harness(server_startup_timeout=120), temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
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


@pytest.fixture(scope="session")
def real_run(tmp_path_factory: pytest.TempPathFactory, small_text: Path) -> Path:
    """A pipeline run's directory as the code writes it: text, training, bigram floor, evaluation, samples. Its processes are functions
    called in here, so it takes a second and no server; the studies are left to their own tests."""
    from gptcore import evaluate, generate
    from gptcore.config import load_config, write_yaml
    from gptcore.shards import prepare
    from gptcore.train import __main__ as train
    from gptloom.flows.run import PipelineRun
    from gptloom.tasks.evaluation import evaluate_model
    from gptloom.tasks.training import train_floor, train_model

    home, mains = tmp_path_factory.mktemp("real"), {"train": train.main, "evaluate": evaluate.main, "generate": generate.main}
    settings = [
        "train.max_steps=4",
        "train.warmup_steps=1",
        "data.section_bytes=1024",
        "data.val_fraction=0.2",
        "evaluate.bootstrap=10",
        "evaluate.samples=1",
    ]
    config = load_config(
        ROOT / "experiments" / "tiny.yaml", [f"data.source={small_text}", "evaluate.sample_tokens=8", *settings]
    )

    def in_this_process(call: list[str], *_: Any, **__: Any) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(json.dumps(mains[call[0].removeprefix("gptcore.")](call[1:])))
        return told

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTLOOM_HOME", str(home))
        patch.setattr("gptloom.tasks.training.run_device_process", in_this_process)
        patch.setattr("gptloom.tasks.records.tracking._git_commit", lambda: "0123abc")
        run = PipelineRun(config, home / "runs" / "real-1", "pipeline")
        run.journal.open(run.name)
        write_yaml(config, run.directory / "config.yaml")
        data = prepare(config, home)
        run.describe_data(data.corpus)
        trained = train_model.fn(config, data.shards, run.name, run.directory / "train")
        evaluation = evaluate_model.fn(config, Path(trained["checkpoint"]), data.shards, run.name, run.directory / "evaluate")
        run.compare(trained, evaluation)
        train_floor.fn(config, data.shards, run.name, run.directory / "floor")
        run.journal.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return run.directory


def wait_for(condition: Callable[[], object], what: str = "waited in vain", seconds: float = 60.0) -> None:
    """Until it is true. The limit is for a program that hangs, not for a machine that has much to do."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@contextmanager
def lock_of_up(home: Path) -> Iterator[None]:
    """What a living `gptloom up` of this home holds."""
    path = home / "servers" / "up.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def users_environment(home: Path) -> dict[str, str]:
    """The environment of a command that a user starts: without what other tests or servers left there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    return kept | {"GPTLOOM_HOME": str(home)}


def log_in(home: Path) -> None:
    """From now on this process says the login of that home, where it asks Prefect by prefect_api.request."""
    os.environ["PREFECT_API_AUTH_STRING"] = (home / "login").read_text().strip()


def require(binary: str, reason: str) -> str:
    """The path of a program that a test needs; without it the test is skipped, or fails where CI promised the program."""
    path = shutil.which(binary)
    if path is None:
        message = f"{binary} is not installed: {reason}"
        if os.environ.get(REQUIRE_VARIABLE) == "1":
            pytest.fail(f"{message} ({REQUIRE_VARIABLE}=1)")
        pytest.skip(message)
    return path

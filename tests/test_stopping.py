"""Every flow that is stopped in its own process returns Cancelled; in a worker's, SIGTERM stays what Prefect's runner made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from prefect.exceptions import CancelledRun, TerminationSignal

from gptloom.flows import budget, data, nightly, pipeline, simulation, steps, study
from gptloom.tasks.records import registry
from gptloom.tasks.runtime.liveness import FLOW_RUN_VARIABLE

SIGNALS = [KeyboardInterrupt(), TerminationSignal(15)]
FLOWS: dict[str, tuple[ModuleType, Callable[[str], Any]]] = {
    "budget": (budget, lambda path: budget.budget.fn(experiment=path)),
    "data": (data, lambda path: data.data.fn(path)),
    "evaluate": (steps, lambda path: steps.evaluate.fn("toy")),
    "nightly": (nightly, lambda path: nightly.nightly.fn(path)),
    "pipeline": (pipeline, lambda path: pipeline.pipeline.fn(path)),
    "simulation": (simulation, lambda path: simulation.simulate_nights.fn(path)),
    "study": (study, lambda path: study.study.fn("timing", smoke=True)),
    "train": (steps, lambda path: steps.train.fn(path)),
}


@pytest.fixture(params=FLOWS)
def stopped(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Call a flow whose first piece of work raises; returns what it returns."""
    module, call = FLOWS[request.param]
    (tmp_path / "toy.yaml").write_text("name: toy\n")

    def run(error: BaseException) -> Any:
        def work(*_args: object, **_options: object) -> None:
            raise error

        @contextmanager
        def open_run(*_args: object, **_options: object) -> Iterator[Any]:
            work()
            yield

        own = SimpleNamespace(get_name=lambda: "toy-1")  # Prefect's would ask a server
        replaced = {
            "check_store": lambda: None,
            "prepare_data": work,
            "open_run": open_run,
            "read_texts": work,
            "flow_run": own,
        }
        for name, value in replaced.items():
            monkeypatch.setattr(module, name, value, raising=False)
        monkeypatch.setattr(nightly, "run_night", work)
        monkeypatch.setattr(registry, "find", lambda _model: SimpleNamespace())
        monkeypatch.setattr(registry, "checkpoint_of", lambda _version: tmp_path)
        (tmp_path / "config.yaml").write_text("name: toy\n")
        return call(str(tmp_path / "toy.yaml"))

    return run


@pytest.mark.parametrize("error", SIGNALS, ids=lambda error: type(error).__name__)
def test_a_flow_that_is_stopped_is_cancelled(stopped: Callable[..., Any], error: BaseException) -> None:
    assert stopped(error).is_cancelled()


def test_a_worker_keeps_its_signal(stopped: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FLOW_RUN_VARIABLE, "1")
    with pytest.raises(TerminationSignal):
        stopped(TerminationSignal(15))


def test_a_budget_whose_pipeline_was_stopped_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline is a flow of its own: what reaches the flow around it is Prefect's word that it was cancelled."""

    def work(*_args: object, **_options: object) -> None:
        raise CancelledRun("stopped by SIGTERM")

    monkeypatch.setattr(budget, "check_store", lambda: None)
    monkeypatch.setattr(budget, "prepare_data", work)
    (tmp_path / "toy.yaml").write_text("name: toy\n")
    state = budget.budget.fn(experiment=str(tmp_path / "toy.yaml"))
    assert (state.is_cancelled(), state.message) == (True, "stopped by SIGTERM")

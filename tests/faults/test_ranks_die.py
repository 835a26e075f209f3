"""One of several processes of a training killed at any moment: all end, the checkpoint stays, the run goes on and ends as if nothing had been.

.venv/bin/pytest tests/faults/test_ranks_die.py               # the short form, part of make test: one kill, mended by the Prefect task
.venv/bin/pytest -s -m long tests/faults/test_ranks_die.py    # 20 kills of a random one, whole and spread models in turn
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainer_process import Training, wait_until

from gptcore.checkpoint import list_checkpoints, step_of
from gptcore.config import ExperimentConfig, load_config, with_changes
from gptcore.journal import read_journal
from gptcore.shards import ShardSet, prepare

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(280),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc"),
]
ROOT = Path(__file__).resolve().parent.parent.parent
KILLS, KILLS_A_RUN = 20, 4


@pytest.fixture(scope="module")
def config(small_text: Path) -> ExperimentConfig:
    settings = [
        "train.max_steps=150",
        "train.save_interval=7",
        "train.log_interval=1",
        "train.eval_interval=1000",
        "train.processes=2",
        "train.micro_batch_size=4",
        "train.ema_decay=0.9",
    ]
    return load_config(ROOT / "experiments" / "tiny.yaml", [f"data.source={small_text}", *settings])


@pytest.fixture(scope="module")
def shards(config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(prepare(config, tmp_path_factory.mktemp("home")).shards)


@pytest.fixture(scope="module")
def whole(config: ExperimentConfig, shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """One process, to which nothing happened."""
    alone = with_changes(config, train={"processes": 1})
    training = Training(alone, shards, tmp_path_factory.mktemp("whole") / "run")
    training.finish()
    return training


def ranks_of(out: Path) -> list[int]:
    """The processes that train into `out`, without the one that started them."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(out) in (folder / "cmdline").read_bytes().decode(errors="replace").split("\0"):
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended while we looked
            continue
    return [pid for pid, parent in parents.items() if parent in parents]


def is_training(out: Path) -> Callable[[], bool]:
    """Asks whether steps were made since now."""
    before = len(read_journal(out / "metrics.jsonl")[0])

    def asks() -> bool:
        records = read_journal(out / "metrics.jsonl")[0]
        return len(records) > before + 5 and records[-1]["kind"] == "metrics"

    return asks


def newest(out: Path) -> int:
    return max(map(step_of, list_checkpoints(out / "checkpoints")), default=0)


def assert_ended_as(training: Training, whole: Training) -> None:
    """Every step once in the curve, with the loss that one process has."""
    assert training.curve() == pytest.approx(whole.curve(), abs=2e-3)  # rounding, 150 steps long
    assert newest(training.out) == whole.config.train.max_steps
    assert read_journal(training.out / "metrics.jsonl")[0][-1]["status"] == "FINISHED"


def test_the_task_goes_on_where_a_killed_process_left_it(
    whole: Training, config: ExperimentConfig, tmp_path: Path, mlflow_store: str, prefect_server: None
) -> None:
    """One process dies, the others would wait for it for ever, and the task with them."""
    from prefect import flow

    from gptloom.tasks.training import train_model

    out, killed, rng = tmp_path / "run" / "train", [], random.Random(0)

    def kill() -> None:
        while not (is_stepping() and newest(out)):
            time.sleep(0.02)
        killed.append(rng.choice(ranks_of(out)))
        os.kill(killed[0], signal.SIGKILL)

    is_stepping = is_training(out)
    murderer = threading.Thread(target=kill, daemon=True)
    murderer.start()

    @flow(persist_result=False)
    def run() -> Any:
        return train_model.with_options(retry_delay_seconds=0)(config, whole.shards.directory, "toy", out)

    result = run()
    assert killed
    assert result["steps"] == 150
    logs = sorted(out.glob("log*.txt"))
    assert len(logs) == 2
    assert "was killed by SIGKILL" in (out / "log.1.txt").read_text()
    assert "resumed at step" in (out / "log.txt").read_text()
    assert not ranks_of(out)
    assert_ended_as(Training(config, whole.shards, out), whole)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_killing_a_random_process_never_loses_a_run(whole: Training, config: ExperimentConfig, tmp_path: Path) -> None:
    rng, kills, slowest = random.Random(1), 0, 0.0
    for number in range(KILLS // KILLS_A_RUN):
        training = Training(config, whole.shards, tmp_path / f"run-{number}")
        for attempt in range(KILLS_A_RUN):
            training.config = with_changes(config, train={"parallel": ("ddp", "fsdp")[attempt % 2]})
            is_stepping, saved = is_training(training.out), newest(training.out)
            process = training.start()
            wait_until(is_stepping, process, 120)
            time.sleep(rng.uniform(0.0, 1.0))
            victim = rng.choice(ranks_of(training.out))
            os.kill(victim, signal.SIGKILL)
            start = time.monotonic()
            said = process.communicate(timeout=60)[1]
            slowest = max(slowest, time.monotonic() - start)
            assert process.returncode == -signal.SIGKILL, said
            assert not ranks_of(training.out), "a process outlived its partner"
            assert newest(training.out) >= saved
            kills += 1
        training.finish()
        assert_ended_as(training, whole)
    assert kills == KILLS
    print(f"\n{kills} kills, no run lost; at most {slowest:.1f} s until all processes had ended")


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_stopped_together(whole: Training, config: ExperimentConfig, tmp_path: Path, parallel: str) -> None:
    """SIGTERM reaches every process twice, from outside and from the one that started it: the second must not cost the checkpoint."""
    changed = with_changes(config, train={"parallel": parallel})
    training = Training(changed, whole.shards, tmp_path / "run")
    process = training.start()
    wait_until(is_training(training.out), process, 120)
    for pid in (process.pid, *ranks_of(training.out)):
        os.kill(pid, signal.SIGTERM)
    out, said = process.communicate(timeout=40)
    assert process.returncode == 75, said
    assert (Path(json.loads(out.splitlines()[-1])["error"].rpartition(" ")[2]) / "COMMITTED").is_file()
    training.finish()
    assert_ended_as(training, whole)

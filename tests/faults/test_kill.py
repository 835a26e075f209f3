"""A training killed at any moment ends with the same bits: SIGKILL (also in the middle of a save), SIGTERM, other ranks, a full disk.

.venv/bin/pytest tests/faults/test_kill.py               # the short form: 3 kills, 1 stop; part of make test
.venv/bin/pytest -s -m long tests/faults/test_kill.py    # the long form: 51 kills, 20 stops more
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import forms, wait_for
from trainer_process import Training, wait_until

from gptcore.checkpoint import list_checkpoints
from gptcore.config import ExperimentConfig, load_config, with_changes
from gptcore.entry import is_running
from gptcore.journal import read_journal
from gptcore.shards import ShardSet, prepare

pytestmark = [pytest.mark.integration, pytest.mark.timeout(280)]
ROOT = Path(__file__).resolve().parent.parent.parent
KILLS_A_RUN = 3


@pytest.fixture(scope="module")
def config(small_text: Path) -> ExperimentConfig:
    """Everything with a state of its own: Muon and AdamW, dropout, an average, early stopping's memory, reports between saves."""
    config = load_config(
        ROOT / "experiments" / "tiny.yaml",
        [f"data.source={small_text}", "train.max_steps=200", "train.save_interval=7", "train.log_interval=4"],
    )
    changes = {"ema_decay": 0.9, "eval_interval": 30, "eval_tokens": 512, "select": "best", "patience": 50}
    return with_changes(config, model={"dropout": 0.1}, train=changes | {"keep_checkpoints": 2, "keep_interval": 70})


@pytest.fixture(scope="module")
def shards(config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(prepare(config, tmp_path_factory.mktemp("home")).shards)


@pytest.fixture(scope="module")
def whole(config: ExperimentConfig, shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """The run that nothing happened to."""
    training = Training(config, shards, tmp_path_factory.mktemp("whole") / "run")
    training.finish()
    return training


def seconds_of(training: Training) -> float:
    """From the first step to the end."""
    times = [r["time_ms"] for r in read_journal(training.out / "metrics.jsonl")[0] if r["kind"] == "metrics"]
    return (times[-1] - times[0]) / 1e3


def assert_as_if_nothing_had_happened(training: Training, whole: Training) -> None:
    assert training.weights_sha256() == whole.weights_sha256()
    assert training.curve() == whole.curve()
    assert training.curve("val/bpb") == whole.curve("val/bpb")
    assert not training.is_saving(), "a torn checkpoint was left"
    records = read_journal(training.out / "metrics.jsonl")[0]
    assert records[-1]["status"] == "FINISHED"
    assert {r["attempt"] for r in records if r["kind"] == "open"} == set(range(records[-1]["attempt"] + 1))


@pytest.mark.parametrize("seed", forms(short=[0], long=range(1, 18)))
def test_killed_at_random_moments(whole: Training, tmp_path: Path, seed: int) -> None:
    """A repeated or skipped batch, a torn checkpoint that is loaded, dropout that starts over: the bits would differ."""
    rng, kills, saves, has_saved = random.Random(seed), 0, 0, False
    training = Training(whole.config, whole.shards, tmp_path / "run")
    while kills < KILLS_A_RUN:
        has_opened = training.has_grown()
        process = training.start()
        wait_until(has_opened, process)
        # Each attempt gets its share, so that the last one still has something to do.
        time.sleep(rng.uniform(0.0, seconds_of(whole) / KILLS_A_RUN))
        is_save = kills % 2 == 1 and wait_until(training.is_saving, process)
        process.kill()
        process.communicate()
        if process.returncode == 0:  # it was faster than its murderer: another run
            assert_as_if_nothing_had_happened(training, whole)
            training = Training(whole.config, whole.shards, tmp_path / f"run-{kills}")
            continue
        assert process.returncode == -signal.SIGKILL
        kills, saves = kills + 1, saves + is_save
        has_saved = bool(list_checkpoints(training.out / "checkpoints"))
    said = training.finish()
    assert ("resumed at step" in said) == has_saved
    assert_as_if_nothing_had_happened(training, whole)
    tags = [r["values"] for r in read_journal(training.out / "metrics.jsonl")[0] if r["kind"] == "tags"]
    opened = sum(r["kind"] == "open" for r in read_journal(training.out / "metrics.jsonl")[0])
    assert {"gptloom.resumes": str(opened - 1)} in tags
    assert saves >= KILLS_A_RUN // 2
    print(f"\nseed {seed}: {kills} kills, {saves} of them during a save; weights and curve identical")


@pytest.mark.parametrize("seed", forms(short=[0], long=range(1, 21)))
def test_stopped_at_a_random_moment(whole: Training, tmp_path: Path, seed: int) -> None:
    """SIGTERM: a checkpoint of the very step, exit code 75 within seconds, and the rest to the bit."""
    training = Training(whole.config, whole.shards, tmp_path / "run")
    process = training.start()
    rng, points = random.Random(seed), len(whole.curve())
    reached = rng.randrange(int(0.6 * points))  # by the run's own progress: its speed depends on what else the machine does
    wait_until(lambda: len(training.curve()) > reached, process)
    time.sleep(rng.uniform(0.0, 0.02))
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    out, said = process.communicate(timeout=30)
    took = time.monotonic() - start
    assert took < 10
    assert process.returncode == 75, said
    error = json.loads(out.splitlines()[-1])["error"]
    if "checkpoint" in error:  # else it came before the first step
        assert (Path(error.rpartition(" ")[2]) / "COMMITTED").is_file()
    training.finish()
    assert_as_if_nothing_had_happened(training, whole)
    print(f"\nseed {seed}: stopped within {took:.2f} s; weights and curve identical")


DEAF = """
import time
from gptcore.entry import StopFlag
StopFlag().install()
print("ready", flush=True)
while True:  # a step that takes for ever
    time.sleep(0.1)
"""


def test_second_signal_exits_at_once() -> None:
    """Whoever presses Ctrl-C twice does not want to wait for the end of a step."""
    process = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None, "the first one lets the step end"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 75


RANK = """
import os, sys, time
from pathlib import Path
from gptcore.entry import follow_parent
follow_parent()
Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(600)
"""
STARTER = """
import os, subprocess, sys
from pathlib import Path
named = {"GPTLOOM_PARENT_PID": str(os.getpid())} if sys.argv[1] == "starter" else {}
process = subprocess.Popen(
    [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *sys.argv[2:]], env={**os.environ, **named}
)
Path(sys.argv[3], "torchrun").write_text(str(process.pid))
process.wait()
"""


@pytest.mark.parametrize("dies", ["starter", "torchrun"])
def test_ranks_die_with_torchrun_and_with_who_started_it(tmp_path: Path, dies: str) -> None:
    """torchrun follows nobody and its processes do not follow it: each would go on holding its GPU."""
    script, pids = tmp_path / "rank.py", tmp_path / "pids"
    script.write_text(RANK)
    pids.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STARTER, dies, str(script), str(pids)]
    starter = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    ranks: list[int] = []
    try:
        assert wait_until(lambda: all((pids / rank).exists() for rank in "01"), starter)
        time.sleep(0.1)
        ranks = [int((pids / rank).read_text()) for rank in "01"]
        torchrun = int((pids / "torchrun").read_text())
        os.kill(starter.pid if dies == "starter" else torchrun, signal.SIGKILL)
        starter.wait(30)
        wait_for(lambda: not any(map(is_running, [torchrun, *ranks])))
    finally:
        starter.kill()
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def plain(config: ExperimentConfig, shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """40 steps without chance in them."""
    changes = {"max_steps": 40, "save_interval": 20, "log_interval": 1, "ema_decay": 0.0, "keep_interval": 20}
    plain = with_changes(config, model={"dropout": 0.0}, train=changes | {"select": "last"})
    training = Training(plain, shards, tmp_path_factory.mktemp("plain") / "run")
    training.finish()
    return training


@pytest.mark.parametrize(
    ("changes", "launcher"),
    [({"micro_batch_size": 2}, ()), ({}, ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"))],
    ids=["micro-batch", "ranks"],
)
def test_resumed_with_another_micro_batch_or_more_ranks(
    plain: Training, tmp_path: Path, changes: dict[str, int], launcher: tuple[str, ...]
) -> None:
    """The order of samples must depend on neither: the losses of the next 20 steps agree but for rounding."""
    half = Training(with_changes(plain.config, train=changes), plain.shards, tmp_path / "half")
    shutil.copytree(plain.out, half.out)
    shutil.rmtree(half.checkpoint)
    (half.out / "metrics.jsonl").unlink()
    said = half.finish(*launcher)
    assert "resumed at step 20" in said
    expected = {tokens: loss for tokens, loss in plain.curve().items() if tokens > 20 * 8 * 32}
    assert len(expected) == 20
    assert half.curve() == pytest.approx(expected, rel=1e-5)
    worst = max(abs(half.curve()[tokens] / loss - 1) for tokens, loss in expected.items())
    print(f"\nlargest relative difference over 20 steps: {worst:.1e}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB. Needs root (or a mount that is allowed)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("when", forms(short=["save"], long=["journal"]))
def test_full_disk_keeps_the_checkpoint_before(whole: Training, small_disk: Path, when: str) -> None:
    """A full disk must not cost what was saved, nor leave half a line or half a checkpoint that is taken for whole."""
    training = Training(whole.config, whole.shards, small_disk / "run")
    process = training.start()
    wait_until(lambda: len(list(small_disk.glob("run/checkpoints/step_*/COMMITTED"))) >= 2, process)
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        free = shutil.disk_usage(small_disk).free
        file.write(bytes(free if when == "journal" else max(0, free - 80_000)))
    out, said = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert "no space left on the disk" in json.loads(out.splitlines()[-1])["error"]
    assert "Traceback" not in said
    filler.unlink()
    said = training.finish()
    assert "resumed at step" in said
    assert training.weights_sha256() == whole.weights_sha256()
    assert training.curve() == whole.curve()

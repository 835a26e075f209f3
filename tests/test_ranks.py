"""Several processes against one: losses, norms, checkpoints, Muon's shares. Over gloo, on a toy whose rows no number of processes divides.

.venv/bin/pytest tests/test_ranks.py
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ranks_process
import torch
from safetensors.torch import load_file

from gptcore.config import UserError, check_config, dump_yaml, load_config, with_changes
from gptcore.models import build_model
from gptcore.optim import muon, sharing
from gptcore.ranks import ALONE, Ranks
from gptcore.shards import ShardSet, prepare
from gptcore.studies.sizes import baseline_config, floor_config
from gptcore.train import trainer as trainer_module
from gptcore.train.trainer import state_mib

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def config(small_text):
    return load_config(
        ROOT / "experiments" / "tiny.yaml",
        [
            f"data.source={small_text}",
            "train.max_steps=6",
            "train.ema_decay=0.5",
            "train.micro_batch_size=1",
            "train.grad_clip=0.5",
            "model.n_embd=18",
            "model.n_head=1",
            "studies.accumulation=false",
        ],
    )


@pytest.fixture(scope="module")
def shards(config, tmp_path_factory) -> ShardSet:
    return ShardSet.open(prepare(config, tmp_path_factory.mktemp("home")).shards)


def train(count, folder, shards, *trainings):
    """What `tests/ranks_process.py` tells of each training `NAME:PARALLEL`, by name."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    done = subprocess.run(
        [
            sys.executable,
            *launcher,
            str(ROOT / "tests" / "ranks_process.py"),
            str(folder / "toy.yaml"),
            "--shards",
            str(shards.directory),
            "--out",
            str(folder),
            "--trainings",
            *trainings,
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return {told["name"]: told for told in map(json.loads, done.stdout.splitlines())}


def copy_half(folder, name, *others):
    """Runs that begin with the first checkpoint of another."""
    for other in others:
        shutil.copytree(folder / name / "checkpoints" / "step_000003", folder / other / "checkpoints" / "step_000003")


@pytest.mark.integration
def test_two_and_four_processes_are_one_whole_or_spread_also_through_a_checkpoint(config, shards, tmp_path, monkeypatch):
    """A mean of means, a norm of one part, a matrix done twice or by nobody, stale weights after an evaluation, a checkpoint that only its
    own number of processes can read."""
    monkeypatch.setattr(muon, "orthogonalize", muon.orthogonalize)  # it is counted in here, too
    (tmp_path / "toy.yaml").write_text(dump_yaml(config))
    one = ranks_process.train(config, shards, tmp_path / "one", ALONE)
    copy_half(tmp_path, "one", "one to 2 spread")
    told = train(2, tmp_path, shards, "2 whole:ddp", "2 spread:fsdp", "one to 2 spread:fsdp")
    copy_half(tmp_path, "2 spread", "2 spread to 4 whole", "2 spread to 4 spread")
    told |= train(4, tmp_path, shards, "4 spread:fsdp", "2 spread to 4 whole:ddp", "2 spread to 4 spread:fsdp")
    copy_half(tmp_path, "4 spread", "4 spread to one")
    told["4 spread to one"] = ranks_process.train(config, shards, tmp_path / "4 spread to one", ALONE)
    assert one["orthogonalized"] == 6 * 2 * (3 + 1 + 1 + 1)  # steps, layers, matrices: query, key, value, three others
    reference = load_file(tmp_path / "one/checkpoints/step_000006/optimizer.safetensors")
    for name, run in told.items():
        is_resumed = " to " in name
        assert run["began"] == (3 if is_resumed else 0), name
        assert run["orthogonalized"] == one["orthogonalized"] / (2 if is_resumed else 1), name
        for key in ("losses", "norms"):
            assert run[key] == pytest.approx(one[key][run["began"] :], rel=2e-5), (name, key)
        assert run["untold"] == (pytest.approx([one["losses"][2]], rel=2e-5) if is_resumed else [])
        assert run["val"] == pytest.approx(one["val"], rel=2e-5), name
        assert run["after"] == pytest.approx(one["after"], rel=2e-5), name
        assert run["sequence_mib"] == pytest.approx(one["sequence_mib"], rel=0.05), name
        saved = load_file(tmp_path / name / "checkpoints/step_000006/optimizer.safetensors")
        assert {key: tensor.shape for key, tensor in saved.items()} == {k: t.shape for k, t in reference.items()}
        torch.testing.assert_close(saved, reference, rtol=1e-2, atol=2e-4)


class Played(Ranks):
    """One of several processes in a test that has them all take turns: what they send lies in `sent`, a list a process."""

    sent: dict[int, list[torch.Tensor]] = {}  # noqa: RUF012

    def start_gather(self, part):
        whole = part.new_empty(self.count * len(part), *part.shape[1:])
        return whole, self._later(part, whole, torch.cat, lambda of_one: of_one)

    def start_exchange(self, parts):
        received = torch.empty_like(parts)
        return received, self._later(parts, received, torch.stack, lambda of_one: of_one[self.rank])

    def _later(self, sent, received, join, mine):
        said = self.sent.setdefault(self.rank, [])
        number = len(said)
        said.append(sent.clone())
        return Later(lambda: received.copy_(join([mine(self.sent[r][number]) for r in range(self.count)])))


class Later:
    def __init__(self, do):
        self.wait = do


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("is_spread", [False, True])
def test_every_matrix_of_a_stack_is_done_once_and_reaches_all(count, is_spread):
    """Five matrices of seven rows: neither divides among the processes, and with four one of them has nothing to do."""
    stack = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(0))
    done = []

    def orthogonal(matrices):
        done.extend(float(m.sum()) for m in matrices)
        return 2 * matrices

    Played.sent.clear()
    parts = [stack] * count if not is_spread else list(stack.split(-(-7 // count), dim=1))
    tasks = [
        sharing.share_out(part, 7, orthogonal, torch.float32, Played(rank, count), is_spread=is_spread)
        for rank, part in enumerate(parts)
    ]
    results = {}
    while len(results) < count:
        for rank, task in enumerate(tasks):
            try:
                next(task)
            except StopIteration as end:
                results[rank] = end.value
    assert sorted(done) == pytest.approx(sorted(float(m.sum()) for m in stack), rel=1e-5)
    for rank, part in enumerate(parts):
        torch.testing.assert_close(results[rank], 2 * part)


def test_exchanges_run_beside_the_work_of_others():
    said = []

    def task(name):
        for part in ("sends", "computes", "applies"):
            said.append(f"{name} {part}")
            yield

    sharing.in_turns(task(name) for name in "ab")
    assert said == ["a sends", "b sends", "a computes", "b computes", "a applies", "b applies"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"family": "lstm"}}, r"train\.parallel=fsdp: needs model\.family=gpt; use train\.parallel=ddp"),
        ({"train": {"precision": "fp8"}}, r"train\.parallel=fsdp: .* use train\.precision=bf16, or train\.parallel=ddp"),
    ],
)
def test_what_cannot_be_spread_is_refused(config, changes, words, monkeypatch):
    from gptcore.device import Device
    from gptcore.train.distribute import spread

    changed = with_changes(config, **changes)
    device = Device(torch.device("cpu"), changed.train.precision, "toy")
    with pytest.raises(UserError, match=words):
        spread(build_model(changed.model, 11), device, Ranks(0, 2))


def test_the_models_beside_a_spread_one_are_not_spread(config):
    """The pipeline's LSTM and bigram would be refused, and the run with them."""
    spread = with_changes(config, train={"parallel": "fsdp", "processes": 4})
    assert baseline_config(spread, 50).train.parallel == floor_config(spread).train.parallel == "ddp"
    assert baseline_config(spread, 50).train.processes == 4


def test_a_spread_model_needs_its_share_of_memory_and_a_batch_that_divides(config):
    whole, share = (state_mib(with_changes(config, train={"parallel": p}), 50, Ranks(0, 4))[1] for p in ("ddp", "fsdp"))
    assert share == whole / 4
    assert not trainer_module.spreads(with_changes(config, train={"parallel": "fsdp"}), ALONE)
    with pytest.raises(UserError, match=r"train\.global_batch_size=8 .* train\.processes=3; use a multiple"):
        check_config({"train": {"global_batch_size": 8, "processes": 3}})

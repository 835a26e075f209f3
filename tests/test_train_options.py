"""The training engine's options, each against a case one can do by hand, and its refusals before step 0."""

import contextlib
import gc
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from gptcore import store
from gptcore.checkpoint import list_checkpoints, load_checkpoint
from gptcore.config import ExperimentConfig, UserError, check_config, dump_yaml, load_config, with_changes
from gptcore.device import Device, choose_device, naming_refusals, set_determinism
from gptcore.entry import StopFlag, recording
from gptcore.errors import NonFinite, Stopped
from gptcore.journal import read_journal
from gptcore.launch import find_cause
from gptcore.ranks import ALONE
from gptcore.shards import ShardSet, prepare
from gptcore.store import DamagedError
from gptcore.train import build_trainer, loop, preflight, resume, train_loop, train_step
from gptcore.train import trainer as trainer_module
from gptcore.train.finite import FiniteWatch, LossScale
from gptcore.train.run import check_processes, run_training
from gptcore.train.trainer import build_forward, missing_compiler

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def config(small_text) -> ExperimentConfig:
    return load_config(ROOT / "experiments" / "tiny.yaml", [f"data.source={small_text}", "train.max_steps=6"])


@pytest.fixture(scope="module")
def shards(config, tmp_path_factory) -> ShardSet:
    return ShardSet.open(prepare(config, tmp_path_factory.mktemp("home")).shards)


def run(config, shards, out):
    trainer = build_trainer(config, shards)
    with recording(out, "toy") as journal:
        return train_loop(trainer, journal, out, StopFlag(), resume(trainer, out))


def metrics(out, key):
    return {
        r["step"]: r["values"][key]
        for r in read_journal(out / "metrics.jsonl")[0]
        if r["kind"] == "metrics" and key in r["values"]
    }


# The first 20 steps of tiny.yaml on a CPU in fp32. Whoever changes the numerics on purpose writes the new ones here, and says why.
GOLDEN = [
    3.296625,
    3.290673,
    3.279233,
    3.257386,
    3.224164,
    3.178444,
    3.106393,
    3.043351,
    2.973848,
    2.909994,
    2.823476,
    2.752237,
    2.705371,
    2.658188,
    2.619674,
    2.601457,
    2.577452,
    2.559618,
    2.546257,
    2.510483,
]


def test_golden_losses(config, shards):
    trainer = build_trainer(with_changes(config, train={"max_steps": 20}), shards)
    losses = [train_step(trainer)[0].item() for _ in range(20)]
    assert losses == pytest.approx(GOLDEN, abs=1e-5)


@pytest.mark.parametrize("preset", ["classic", "gpt2", "modern"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_preset_learns_with_every_optimizer(config, shards, preset, optimizer):
    lr = 0.003 if optimizer == "adamw" else 0.02
    changed = with_changes(
        config, model={"preset": preset}, train={"optimizer": optimizer, "lr": lr, "max_steps": 40, "warmup_steps": 5}
    )
    trainer = build_trainer(changed, shards)
    losses = [train_step(trainer)[0].item() for _ in range(40)]
    assert losses[0] == pytest.approx(math.log(shards.vocab_size), rel=0.05)
    assert losses[-1] < 0.9 * losses[0]


def test_tokens_end_a_run_in_whole_steps(config, shards, tmp_path):
    per_step = config.train.global_batch_size * config.model.block_size
    result = run(with_changes(config, train={"max_steps": None, "max_tokens": 4 * per_step + 1}), shards, tmp_path)
    assert (result["steps"], result["tokens_seen"]) == (5, 5 * per_step)


def test_minutes_end_a_run_and_the_schedule_follows(config, shards, tmp_path, monkeypatch):
    """A schedule that follows steps while the clock ends the run would stop at the peak learning rate."""
    now = [0.0]
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: now[0])
    trainer = build_trainer(with_changes(config, train={"max_steps": None, "minutes": 1, "warmup_steps": 1}), shards)
    trainer.started = 0.0
    factors = []
    while trainer.progress() < 1:
        factors.append(train_step(trainer)[2])
        now[0] += 5.0  # seconds a step
    assert len(factors) == 12
    assert factors[-1] == pytest.approx(5 / 60 / trainer.config.train.decay_fraction)
    assert trainer.progress() == 1.0


def test_an_end_on_the_command_line_replaces_those_of_the_file(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text("train: {max_steps: 50}\n")
    assert load_config(path).train.max_steps == 50
    changed = load_config(path, ["train.minutes=2"]).train
    assert (changed.max_steps, changed.minutes, changed.length) == (None, 2.0, "2 minutes")
    both = load_config(path, ["train.minutes=2", "train.max_steps=30", "train.max_tokens=400"])
    assert both.train.count_steps(10) == 2


def test_early_stopping_hands_on_the_best_weights(config, shards, tmp_path, monkeypatch):
    """The last weights instead of the best, or a counter that never resets."""
    scripted = iter([9.0, 3.0, 2.0, 2.5, 2.4, 2.0])  # the untrained model's, then one every two steps
    real = loop.evaluate_loss

    def evaluate_loss(*args, **kwargs):
        evaluation = real(*args, **kwargs)
        if args[4]:  # during training
            object.__setattr__(evaluation, "record_nats", evaluation.record_bytes * math.log(2) * next(scripted))
        return evaluation

    monkeypatch.setattr(loop, "evaluate_loss", evaluate_loss)
    changed = with_changes(config, train={"max_steps": 100, "eval_interval": 2, "patience": 2, "select": "best"})
    result = run(changed, shards, tmp_path)
    assert (result["steps"], result["best_step"]) == (8, 4)
    assert Path(result["checkpoint"]).name == "step_000004"
    best = load_checkpoint(Path(result["checkpoint"]))
    trainer = build_trainer(changed, shards)
    for _ in range(4):
        train_step(trainer)
    torch.testing.assert_close(best.model, trainer.model.weights(), rtol=0, atol=0)


def test_the_average_is_evaluated_saved_and_resumed(config, shards, tmp_path):
    changed = with_changes(config, train={"ema_decay": 0.5, "save_interval": 3, "max_steps": 6})
    whole = run(changed, shards, tmp_path / "whole")
    trainer = build_trainer(changed, shards)
    for _ in range(6):
        train_step(trainer)
    saved = load_checkpoint(Path(whole["checkpoint"])).model
    torch.testing.assert_close(saved, trainer.average.average, rtol=0, atol=0)
    assert not torch.equal(saved["lm_head.weight"], trainer.model.lm_head.weight)
    (tmp_path / "half" / "checkpoints").mkdir(parents=True)
    os.rename(tmp_path / "whole/checkpoints/step_000003", tmp_path / "half/checkpoints/step_000003")
    resumed = run(changed, shards, tmp_path / "half")
    assert resumed["val_loss"] == whole["val_loss"]


def test_a_bad_step_found_late_changes_nothing_and_is_named(config, shards):
    """As on a GPU, where the device is asked only when a report is due."""
    trainer = build_trainer(config, shards)
    trainer.watch = FiniteWatch(trainer.device.torch, at_once=False)
    for _ in range(3):
        train_step(trainer)
    before = {name: p.clone() for name, p in trainer.model.weights().items()}
    forward = trainer.forward
    trainer.forward = lambda *args, **kwargs: (None, forward(*args, **kwargs)[1] * float("nan"))
    train_step(trainer)
    trainer.forward = forward
    train_step(trainer)
    torch.testing.assert_close(trainer.model.weights(), before, rtol=0, atol=0)
    with pytest.raises(NonFinite, match=r"nan at step 3 with train\.lr="):
        trainer.watch.check(trainer.step, trainer.config.train.lr)


def test_fp16_scaling_changes_no_gradient_and_leaves_an_overflow_out(config, shards):
    plain, scaled = build_trainer(config, shards), build_trainer(config, shards)
    scaled.loss_scale = LossScale(scaled.device.torch, 2.0**12)
    for trainer in (plain, scaled):
        train_step(trainer)
    torch.testing.assert_close(scaled.model.weights(), plain.model.weights(), rtol=1e-4, atol=1e-5)
    before = {name: p.clone() for name, p in scaled.model.weights().items()}
    # An overflow, with a finite loss.
    hook = scaled.model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda gradient: gradient * float("inf"))
    train_step(scaled)
    hook.remove()
    torch.testing.assert_close(scaled.model.weights(), before, rtol=0, atol=0)
    assert scaled.loss_scale.scale.item() == 2.0**11
    scaled.watch.check(scaled.step, 0.1)
    train_step(scaled)  # goes on from the momentum before the overflow
    assert all(p.isfinite().all() for p in scaled.model.parameters())
    scaled.loss_scale.scale.fill_(1e-6)
    with pytest.raises(NonFinite, match=r"train\.precision=bf16"):
        scaled.loss_scale.check(2, 0.1)


def test_preflight_learns_nothing_and_chooses_a_micro_batch_that_fits(config, shards, monkeypatch):
    trainer = build_trainer(with_changes(config, model={"dropout": 0.1}), shards)
    before, rng = {n: p.clone() for n, p in trainer.model.weights().items()}, torch.get_rng_state()
    estimate = preflight(trainer)
    assert estimate.parameters == trainer.model.count_parameters()
    assert estimate.flops == trainer.model.flops_per_token() * trainer.tokens_per_step * 6
    assert estimate.seconds == pytest.approx(6 * estimate.step_ms / 1e3)
    assert "preflight" in estimate.line("here")
    assert torch.equal(rng, torch.get_rng_state())
    torch.testing.assert_close(trainer.model.weights(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer.micro_batch_size == 8
    monkeypatch.setattr(Device, "free_mib", lambda self: (estimate.state_mib + 3.5 * estimate.sequence_mib) / 0.9)
    assert preflight(trainer).sequence_mib == pytest.approx(estimate.sequence_mib)
    assert trainer.micro_batch_size == 2  # three fit, and 3 does not divide 8
    monkeypatch.setattr(Device, "free_mib", lambda self: estimate.state_mib)
    with pytest.raises(UserError, match=r"model\.block_size"):
        preflight(trainer)


def test_a_compiler_that_fails_or_is_missing_is_no_failure(config, shards, monkeypatch, caplog):
    from torch._dynamo.exc import TorchDynamoException

    trainer = build_trainer(config, shards)

    def broken(*args, **kwargs):
        raise TorchDynamoException("cannot compile")

    trainer = build_trainer(with_changes(config, train={"compile": "on"}), shards)
    trainer.forward = broken
    preflight(trainer)
    assert trainer.forward is trainer.model
    assert "cannot compile" in caplog.text
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "C++ compiler" in (missing_compiler(trainer.device) or "")
    assert build_forward(trainer.model, trainer.device, trainer.ranks, "on") is trainer.model


def test_no_garbage_collection_in_a_step(config, shards):
    with loop.controlled_gc():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_the_line_and_the_journal_tell_the_same(config, shards, tmp_path, caplog):
    caplog.set_level("INFO")
    run(config, shards, tmp_path)
    loss, bpb = metrics(tmp_path, "train/loss")[6], metrics(tmp_path, "train/bpb")[6]
    assert f"step 6/6  loss {loss:.4f} ({bpb:.3f} bpb)  val " in caplog.text
    assert all(word in caplog.text for word in ("tok/s", "ms", "MiB", "ETA"))
    assert bpb == pytest.approx(loss / math.log(2), rel=0.02)  # a character is a byte here, but for the ends of documents


# Bad input: each refused before step 0, naming field and remedy.


def test_a_batch_that_cannot_be_divided_is_refused(config, shards):
    from gptcore.ranks import Ranks

    with pytest.raises(UserError, match=r"train\.global_batch_size=8 .* 3 processes; use a multiple"):
        build_trainer(config, shards, Ranks(0, 3))
    with pytest.raises(UserError, match=r"train\.micro_batch_size=8 does not divide the 4"):
        build_trainer(with_changes(config, train={"micro_batch_size": 8}), shards, Ranks(0, 2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"padded_vocab_size": 5}}, r"model\.padded_vocab_size=5 .* raise it or leave it out"),
        ({"train": {"device": "cuda"}}, r"train\.device=cuda: .* use train\.device=auto"),
        ({"train": {"precision": "tf32"}}, r"train\.precision=tf32: .* has no tf32; use train\.precision=auto or fp32"),
        ({"train": {"precision": "fp16"}}, r"train\.precision=fp16: .* has no fp16"),
        ({"train": {"precision": "fp8"}}, r"train\.precision=fp8: .* has no fp8"),
        ({"train": {"cuda_graph": "on"}}, r"train\.cuda_graph=on: .* use train\.cuda_graph=off"),
        ({"model": {"block_size": 100_000}}, r"model\.block_size"),
        ({"model": {"n_layer": 900, "n_embd": 20_000}}, r"parameters: .* need [\d,]+ MiB, .* lower model\.n_layer=900"),
    ],
)
def test_what_the_machine_or_the_shards_cannot_do_is_refused(config, shards, changes, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=words):
        build_trainer(with_changes(config, **changes), shards)


def test_deterministic_mode_is_the_configs_and_refused_with_the_field(config, shards, monkeypatch):
    """Left on, it would slow the next cell of a study; a traceback of torch's would not say which field to change."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    gpu = Device(torch.device("cuda"), "fp32", "a GPU")
    with pytest.raises(UserError, match=r"train\.deterministic=true: CUBLAS_WORKSPACE_CONFIG=:0:0 .* :4096:8 or :16:8"):
        set_determinism(True, gpu)
    for is_on in (True, False):
        build_trainer(with_changes(config, train={"deterministic": is_on}), shards)
        assert torch.are_deterministic_algorithms_enabled() == is_on
    message = "cumsum_cuda_kernel does not have a deterministic implementation, but you set …"
    with pytest.raises(UserError, match=r"train\.deterministic=true: cumsum_cuda_kernel .* model\.family"), naming_refusals():
        raise RuntimeError(message)
    with pytest.raises(RuntimeError, match="else"), naming_refusals():
        raise RuntimeError("anything else")


def test_bf16_on_a_processor_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(UserError, match=r"train\.precision=bf16: .* has no bf16"):
        choose_device("cpu", "bf16")


def test_shards_that_changed_under_a_run_are_refused(config, shards, tmp_path):
    """A flipped id trains on without a word; another set of shards continues a run it does not belong to."""
    run(config, shards, tmp_path / "out")
    other = with_changes(config, data={"val_fraction": 0.2})
    with pytest.raises(UserError, match="its checkpoints were trained on shard set"):
        resume(build_trainer(config, ShardSet.open(prepare(other, tmp_path / "home").shards)), tmp_path / "out")
    copy = prepare(config, tmp_path / "home2").shards
    ids = next(ShardSet.open(copy).token_dirs[0].glob("train_*.bin"))
    with open(ids, "r+b") as file:
        file.seek(2000)
        file.write(b"\1")
    with pytest.raises(UserError, match=r"train_0+\.bin"):
        run(config, ShardSet.open(copy), tmp_path / "out2")


def test_a_training_begins_before_its_shards_are_verified_and_saves_nothing_of_damaged_ones(
    config, shards, tmp_path, monkeypatch
):
    """The step must not wait for a second a gigabyte; and no checkpoint may hold what was learnt from other text than was written."""
    monkeypatch.setattr("gptcore.shards.shard_set.SMALL_BYTES", 0)
    monkeypatch.setattr(StopFlag, "install", lambda _: None)
    copy = ShardSet.open(prepare(config, tmp_path / "home").shards)
    ids = next(copy.token_dirs[0].glob("train_*.bin"))
    monkeypatch.setattr("gptcore.store._known", {})
    config, may_hash = with_changes(config, train={"max_steps": 5, "save_interval": 5}), threading.Event()
    slow = store.hash_file
    monkeypatch.setattr(store, "hash_file", lambda path: (path != ids or may_hash.wait(60)) and slow(path))
    steps = []
    monkeypatch.setattr(loop, "train_step", lambda trainer, real=loop.train_step: steps.append(trainer.step) or real(trainer))
    monkeypatch.setattr(loop, "check_finite", lambda trainer: trainer.step == 5 and may_hash.set())
    for is_damaged in (False, True):
        out = tmp_path / f"out-{is_damaged}"
        may_hash.clear()
        steps.clear()
        if is_damaged:
            raw = bytearray(ids.read_bytes())
            raw[-2] ^= 1
            ids.write_bytes(raw)
        with pytest.raises(DamagedError) if is_damaged else contextlib.nullcontext():
            run_training(config, copy, out, ALONE, None, None)
        assert steps == [0, 1, 2, 3, 4], "the training waited"
        assert [path.name for path in list_checkpoints(out / "checkpoints")] == ([] if is_damaged else ["step_000005"])
        assert not [thread for thread in threading.enumerate() if thread.name == "verification"]
    last = read_journal(out / "metrics.jsonl")[0][-1]
    assert re.search(r"train_0+\.bin: content differs.* read from step 1 on; no checkpoint", json.dumps(last)), last


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda path: path.name)
def test_every_experiment_loads_and_says_what_it_takes(path):
    config = load_config(path)
    head = path.read_text(encoding="utf-8").split("\n\nmodel:")[0]
    assert f"experiments/{path.name}" in head
    assert "Device:" in head
    assert load_dumped(config) == config


def load_dumped(config):
    return check_config(yaml.safe_load(dump_yaml(config)))


@pytest.mark.integration
def test_the_loss_curve_does_not_depend_on_the_number_of_processes(config, shards, tmp_path):
    """The process itself starts the others, spread, and takes the best weights at the end (tests/test_ranks.py has every combination)."""
    changed = with_changes(config, train={"log_interval": 1, "eval_interval": 3, "select": "best"})
    alone = run(changed, shards, tmp_path / "1")
    path, out = tmp_path / "tiny.yaml", tmp_path / "2"
    path.write_text(dump_yaml(changed))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "gptcore.train",
            str(path),
            "train.processes=2",
            "train.parallel=fsdp",
            "--shards",
            str(shards.directory),
            "--out",
            str(out),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, "one process speaks for all"
    assert list(metrics(out, "train/loss")) == [1, 2, 3, 4, 5, 6]
    assert metrics(out, "train/loss") == pytest.approx(metrics(tmp_path / "1", "train/loss"), abs=2e-5)
    assert json.loads(done.stdout)["val_loss"] == pytest.approx(alone["val_loss"], abs=2e-5)
    assert read_journal(out / "metrics.jsonl")[0][-1]["status"] == "FINISHED"
    assert json.loads((out / "accumulation.json").read_text())["passed"]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    train = check_config({"train": {"processes": 4}}).train
    with pytest.raises(UserError, match=r"train\.processes=4: this machine has 2 GPU.* use train\.processes=2"):
        check_processes(train)
    check_processes(train.model_copy(update={"device": "cpu"}))


def test_of_several_failures_the_cause_is_told():
    """The one whose partner died fails too, and often first."""
    from types import SimpleNamespace

    def cause(*codes):
        return find_cause([(rank, SimpleNamespace(exitcode=code)) for rank, code in enumerate(codes)])[0]

    assert cause(1, -9) == 1
    assert cause(1, 1, 77) == 2
    assert cause(2, 2) == 0
    assert cause(-15, 1) == 1
    assert cause(75, 76) == 1


@pytest.mark.parametrize("when", ["in a step", "while the last step is saved"])
def test_a_stop_does_not_wait_for_the_whole_verification(config, shards, tmp_path, monkeypatch, when):
    """Half a minute after SIGTERM comes SIGKILL; and what is not verified is not saved."""
    monkeypatch.setattr("gptcore.shards.shard_set.SMALL_BYTES", 0)
    monkeypatch.setattr("gptcore.shards.verification.STOP_S", 0.1)
    monkeypatch.setattr("gptcore.shards.verification.CLOSE_S", 0.1)
    monkeypatch.setattr("gptcore.store._known", {})
    flags, may_hash, real = [], threading.Event(), (store.hash_file, loop.train_step)
    monkeypatch.setattr(StopFlag, "install", lambda self: flags.append(self))
    shards = ShardSet.open(shards.directory)
    ids = next(shards.token_dirs[0].glob("train_*.bin"))
    monkeypatch.setattr(store, "hash_file", lambda path: (path != ids or may_hash.wait(60)) and real[0](path))

    def stop_at(step):
        if step == {"in a step": 2, "while the last step is saved": 4}[when]:
            flags[0]._handle(15, None)

    if when == "in a step":
        monkeypatch.setattr(loop, "train_step", lambda trainer: stop_at(trainer.step) or real[1](trainer))
    else:
        monkeypatch.setattr(loop, "check_finite", lambda trainer: stop_at(trainer.step - 1))
    config = with_changes(config, train={"max_steps": 5, "save_interval": 5})
    began = time.monotonic()
    try:
        with pytest.raises(Stopped, match=r"^stopped at step [35], which is not saved: its text was still being verified"):
            run_training(config, shards, tmp_path / "out", ALONE, None, None)
        assert time.monotonic() - began < 30
    finally:
        may_hash.set()
    assert list_checkpoints(tmp_path / "out" / "checkpoints") == []


def test_messages_name_token_files_as_they_lie(shards):
    assert all(".." not in path.parts for path in shards.token_dirs)

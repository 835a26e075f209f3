"""The trainer: it learns, its batches are exact, it resumes to the bit, it stops before a bad step."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gptcore import resampling
from gptcore.checkpoint import list_checkpoints, load_checkpoint, load_model, newest_whole, read_state, write_tensors
from gptcore.config import ExperimentConfig, UserError, check_config, dump_yaml, with_changes
from gptcore.device import choose_device
from gptcore.entry import StopFlag, recording
from gptcore.errors import NonFinite, Stopped
from gptcore.evaluate import Evaluation, bootstrap_bpb, evaluate_loss
from gptcore.evaluate import main as evaluate
from gptcore.journal import read_journal
from gptcore.nights.gate import compare
from gptcore.nights.scores import Scores
from gptcore.ranks import ALONE
from gptcore.shards import ShardSet, prepare
from gptcore.store import commit_dir, read_json, write_json
from gptcore.train import accumulate_gradients, build_trainer, resume, train_loop, train_step
from gptcore.train.run import run_training as process
from gptcore.train.saving import _choose

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def config(small_text) -> ExperimentConfig:
    return check_config(
        {
            "data": {"source": str(small_text)},
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16},
            "train": {
                "global_batch_size": 8,
                "max_steps": 6,
                "warmup_steps": 2,
                "log_interval": 2,
                "eval_interval": 3,
                "eval_tokens": 512,
                "save_interval": 3,
                "device": "cpu",
            },
        }
    )


@pytest.fixture(scope="module")
def shards(config, tmp_path_factory) -> ShardSet:
    return ShardSet.open(prepare(config, tmp_path_factory.mktemp("home")).shards)


def run(config, shards, out, stop=None):
    trainer = build_trainer(config, shards)
    with recording(out, "toy") as journal:
        memory = resume(trainer, out)
        return train_loop(trainer, journal, out, stop or StopFlag(), memory)


def test_a_short_run_learns_and_reports(config, shards, tmp_path):
    longer = with_changes(config, train={"max_steps": 60, "eval_interval": 30, "save_interval": 30, "keep_checkpoints": 1})
    result = run(longer, shards, tmp_path)
    assert result["untrained_loss"] == pytest.approx(result["uniform_loss"], rel=0.05)
    assert result["val_loss"] < 0.75 * result["untrained_loss"]
    assert [c.name for c in list_checkpoints(tmp_path / "checkpoints")] == ["step_000060"]
    metrics = [r for r in read_journal(tmp_path / "metrics.jsonl")[0] if r["kind"] == "metrics"]
    losses = [r for r in metrics if "train/loss" in r["values"]]
    assert [r["step"] for r in losses] == list(range(2, 61, 2))
    assert all(r["tokens_seen"] == r["step"] * 8 * 16 for r in losses)
    assert metrics[-1]["values"].keys() >= {"time/forward_seconds", "time/optimizer_seconds"}


def test_micro_batches_give_the_gradient_of_the_whole_batch(config, shards):
    """The mean over micro-batch means would only agree by luck of equal sizes; the sum over targets always does."""
    grads = []
    for micro in (8, 2, 1):
        trainer = build_trainer(with_changes(config, train={"micro_batch_size": micro}), shards)
        trainer.model.double()
        loss = accumulate_gradients(trainer)
        grads.append((loss, [p.grad.clone() for p in trainer.model.parameters()]))
    for loss, other in grads[1:]:
        torch.testing.assert_close(loss, grads[0][0])
        for a, b in zip(other, grads[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)  # the loss itself is summed in float32


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_update(config, shards, monkeypatch):
    plain = build_trainer(config, shards)
    squeezed = build_trainer(config, shards)
    forward = squeezed.forward

    def small_memory(x, y, **kwargs):
        if len(x) > 3:
            raise torch.OutOfMemoryError("too many rows")
        return forward(x, y, **kwargs)

    squeezed.forward = small_memory
    train_step(plain)
    train_step(squeezed)
    assert squeezed.micro_batch_size == 2
    for a, b in zip(plain.model.parameters(), squeezed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_resumed_run_ends_with_the_same_bits(config, shards, tmp_path):
    config = with_changes(config, model={"dropout": 0.1})  # so that the random state matters too
    whole = run(config, shards, tmp_path / "whole")

    class AfterFour(StopFlag):
        def __bool__(self):
            return trainer.step >= 4

    trainer = build_trainer(config, shards)
    with pytest.raises(Stopped, match="step 4 of 6"), recording(tmp_path / "parts", "toy") as journal:
        train_loop(trainer, journal, tmp_path / "parts", AfterFour())
    torch.manual_seed(99)
    first_part_s = read_state(tmp_path / "parts" / "checkpoints" / "step_000004")["seconds"]
    began = time.perf_counter()
    parts = run(config, shards, tmp_path / "parts")
    assert first_part_s < parts["seconds"] < first_part_s + time.perf_counter() - began  # of both attempts
    one, two = (load_checkpoint(Path(r["checkpoint"])).model for r in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert parts["val_loss"] == whole["val_loss"]


def test_another_config_is_not_resumed(config, shards, tmp_path):
    run(config, shards, tmp_path)
    with pytest.raises(UserError, match="another config"):
        run(with_changes(config, train={"lr": 0.5}), shards, tmp_path)


def test_a_refused_config_leaves_the_run_as_it_was(config, shards, tmp_path):
    run(config, shards, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"another config \(train\.lr: .* there, 0\.5 now\)"):
        process(with_changes(config, train={"lr": 0.5}), shards, tmp_path, ALONE, None, None)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_steps_are_numbers_not_names(config, shards, tmp_path):
    """Past a million a later step sorts before an earlier one by name, and a copy that someone kept is not a checkpoint of the run."""
    run(config, shards, tmp_path)
    folder = tmp_path / "checkpoints"
    (folder / "step_000006").rename(folder / "step_1000000")
    shutil.copytree(folder / "step_1000000", folder / "step_999500")
    shutil.copytree(folder / "step_1000000", folder / "step_000500_good")
    names = sorted(path.name for path in folder.iterdir())
    assert newest_whole(folder) == (folder / "step_1000000", [])
    assert _choose(tmp_path) == 1_000_000
    assert sorted(path.name for path in folder.iterdir()) == names


def test_a_loss_that_is_no_number_stops_before_the_update(config, shards):
    trainer = build_trainer(config, shards)
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = float("inf")
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    with pytest.raises(NonFinite, match=r"step 0 with train\.lr=0\.02"):
        train_step(trainer)
    assert all(torch.equal(before[n], p) for n, p in trainer.model.named_parameters())


def test_evaluation_is_the_mean_over_every_token_whatever_the_batch(config, shards):
    model = build_trainer(config, shards).model
    device = choose_device("cpu", "fp32")
    one, many = (evaluate_loss(model, shards, device, size) for size in (1, 64))
    assert one.tokens == many.tokens == shards.n_tokens["val"] - 1
    assert one.loss == pytest.approx(many.loss, rel=1e-6)
    tokens = torch.as_tensor(shards.tokens("val")[:17].astype("int64"))
    with torch.no_grad():
        first = model(tokens[None, :-1], tokens[None, 1:])[1].item()
    assert evaluate_loss(model, shards, device, 1, max_tokens=16).loss == pytest.approx(first, rel=1e-6)


def test_a_part_of_the_split_ends_with_a_batch(config, shards):
    """So the batch size decides how many tokens select=best compares; the fields say so."""
    trainer = build_trainer(config, shards)
    T = config.model.block_size
    seen = [evaluate_loss(trainer.model, shards, trainer.device, size, 5 * T).tokens for size in (1, 4)]
    assert seen == [5 * T, 8 * T]
    said = type(config.evaluate).model_fields["batch_size"].description
    assert "train.eval_tokens is rounded up to whole batches" in said


def test_bits_per_byte_of_a_uniform_guess(config, shards):
    """log2 V bits a character, and characters are bytes in this text: the yardstick on a case one can do by hand."""
    model = build_trainer(config, shards).model
    torch.nn.init.zeros_(model.lm_head.weight)
    evaluation = evaluate_loss(model, shards, choose_device("cpu", "fp32"), 16)
    assert evaluation.bpb == pytest.approx(math.log2(shards.vocab_size), rel=1e-6)


def test_the_interval_resamples_documents_and_needs_enough_of_them():
    nats, sizes = np.array([1.0, 2.0, 3.0, 4.0] * 6), np.full(24, 2.0)
    evaluation = Evaluation(nats.sum(), 24, nats, sizes, np.zeros(1), np.arange(24) // 2)
    interval = bootstrap_bpb(evaluation, 500, 0)
    assert interval is not None
    low, high, unit = interval
    assert unit == "documents"
    assert low < evaluation.bpb < high
    assert (
        bootstrap_bpb(replace(evaluation, record_documents=np.zeros(24)), 500, 0)[2] == "sections"
    )  # one document says nothing about others
    few = Evaluation(6.0, 3, nats[:3], sizes[:3], np.zeros(1), np.zeros(3))
    assert bootstrap_bpb(few, 500, 0) is None


@pytest.mark.parametrize("clusters", [37, 501])
def test_resampling_in_chunks_draws_what_it_drew_at_once(clusters, monkeypatch):
    """All draws at once were gigabytes for a corpus of 400,000 documents. 501: more than a chunk has."""
    nats, sizes = np.random.default_rng(1).random((2, clusters))
    draws = np.random.default_rng(2).integers(0, clusters, (1001, clusters))
    monkeypatch.setattr(resampling, "DRAWS_AT_ONCE", 260)
    for drawn, column in zip(resampling.resampled_sums((nats, sizes), 1001, 2), (nats, sizes), strict=True):
        assert np.array_equal(drawn, column[draws].sum(1))


def test_both_intervals_need_little_memory():
    nats, sizes = np.random.default_rng(1).random((2, 100_000))
    documents = np.arange(100_000)
    scores = Scores(nats, sizes, documents, np.zeros(100_000))
    tracemalloc.start()
    assert bootstrap_bpb(Evaluation(nats.sum(), 100_000, nats, sizes, np.zeros(1), documents), 100, 0) is not None
    assert compare(scores, scores, 100).high == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 2**20  # at once: 150 MiB


def test_a_loss_too_large_for_a_perplexity_is_still_a_loss():
    """The evaluation of a bad model ended in an OverflowError."""
    evaluation = Evaluation(8000.0, 10, np.array([8000.0]), np.array([10.0]), np.zeros(1), np.zeros(1))
    assert evaluation.ppl is None
    assert evaluation.metrics().keys() == {"val/loss", "val/bpb"}
    assert Evaluation(20.0, 10, np.array([20.0]), np.array([10.0]), np.zeros(1), np.zeros(1)).ppl == pytest.approx(math.e**2)


def test_a_loaded_model_is_the_saved_one(config, shards, tmp_path):
    result = run(config, shards, tmp_path)
    model, _ = load_model(Path(result["checkpoint"]))
    evaluation = evaluate_loss(model, shards, choose_device("cpu", "fp32"), 64)
    assert evaluation.loss == pytest.approx(result["val_loss"], rel=1e-6)


def test_weights_that_cannot_be_written_raise_what_the_system_said(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_tensors({"a": torch.zeros(3)}, tmp_path / "nowhere" / "model.safetensors")


def test_a_flipped_bit_in_a_checkpoint_is_refused(config, shards, tmp_path):
    weights = Path(run(config, shards, tmp_path)["checkpoint"]) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_checkpoint(weights.parent)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"train\.device=cuda"):
        choose_device("cuda")


BLOCKED = """
import runpy, sys
for name in ("prefect", "mlflow", "pyarrow", "pandas", "tokenizers"):
    sys.modules[name] = None  # an import of it now raises
sys.argv = ["train", *sys.argv[1:]]
runpy.run_module("gptcore.train", run_name="__main__")
"""


@pytest.mark.integration
def test_the_process_trains_with_prefect_and_mlflow_blocked(config, shards, tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(dump_yaml(config))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            BLOCKED,
            str(path),
            "train.max_steps=4",
            "--shards",
            str(shards.directory),
            "--out",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["steps"] == 4
    assert Path(result["checkpoint"]).name == "step_000004"
    assert "step 4/4" in done.stderr


@pytest.mark.integration
def test_a_users_mistake_is_one_line_and_exit_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "gptcore.train", "nowhere.yaml"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"GPTLOOM_HOME": str(tmp_path)},
    )
    assert done.returncode == 2
    assert "nowhere.yaml" in json.loads(done.stdout)["error"]
    assert "Traceback" not in done.stderr


# Checkpoints: the newest whole one, what is kept, and what goes wrong beside the training.


def test_a_damaged_checkpoint_is_skipped_and_said(config, shards, tmp_path, caplog):
    """A flipped bit must neither be trained on nor cost the whole run: the one before is whole."""
    whole = run(config, shards, tmp_path)
    newest = Path(whole["checkpoint"])
    data = bytearray((newest / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "optimizer.safetensors").write_bytes(data)
    (newest.parent / "step_000099").mkdir()  # renamed, but killed before its marker
    (newest.parent / ".step_000100.abc.tmp").mkdir()
    again = run(config, shards, tmp_path)
    assert "optimizer.safetensors: content differs" in caplog.text
    assert again["val_loss"] == whole["val_loss"]
    names = sorted(path.name for path in newest.parent.iterdir())
    assert names == ["damaged_step_000006", "step_000003", "step_000006"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_checkpoint_that_cannot_be_read_stays_and_nothing_begins_anew(config, shards, tmp_path, refuse, number):
    """It was put aside as damaged, and days of training began at step 0."""
    from gptcore.checkpoint import prune_checkpoints

    newest = Path(run(config, shards, tmp_path)["checkpoint"])
    before = sorted(newest.parent.rglob("*"))
    refuse(newest / "model.safetensors", number)
    with pytest.raises(OSError, match=r"step_000006/model\.safetensors"):
        run(config, shards, tmp_path)
    refuse(newest / "state.json", number)
    prune_checkpoints(newest.parent, last=1)
    assert sorted(newest.parent.rglob("*")) == before


def test_a_folder_of_checkpoints_that_cannot_be_looked_at_is_not_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "scandir", lambda path=".": _refused(path))
    monkeypatch.setattr(os, "listdir", lambda path=".": _refused(path))
    with pytest.raises(OSError, match="checkpoints"):
        newest_whole(tmp_path / "checkpoints")


def _refused(path):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def test_kept_are_the_newest_every_nth_and_the_best(config, shards, tmp_path):
    from gptcore.checkpoint import prune_checkpoints

    changed = with_changes(config, train={"save_interval": 1, "keep_checkpoints": 9, "max_steps": 9, "eval_interval": 9})
    run(changed, shards, tmp_path)
    folder = tmp_path / "checkpoints"
    newest = folder / "step_000009"
    manifest, state = read_json(newest / "manifest.json"), read_json(newest / "state.json")
    with commit_dir(tmp_path / "best", manifest) as tmp:
        shutil.copytree(newest, tmp, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json", "COMMITTED"))
        write_json(tmp / "state.json", state | {"best_step": 5})
    shutil.rmtree(newest)
    (tmp_path / "best").rename(newest)
    prune_checkpoints(folder, 2, 4)
    assert [path.name for path in list_checkpoints(folder)] == [f"step_{n:06d}" for n in (4, 5, 8, 9)]


def test_an_error_of_the_writer_surfaces_at_the_next_step(config, shards, tmp_path, monkeypatch):
    """Saving in a thread that fails in silence: the run would end without a checkpoint after step 3."""
    from gptcore.train import writer

    def full(folder, snapshot):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space"):
        run(with_changes(config, train={"max_steps": 1000}), shards, tmp_path)
    steps = [r["step"] for r in read_journal(tmp_path / "metrics.jsonl")[0] if r["kind"] == "metrics"]
    assert max(steps) < 100


def test_what_is_saved_is_the_step_it_names(config, shards, tmp_path, monkeypatch):
    """A writer that reads the live weights saves a mixture of steps."""
    from gptcore.train import writer

    real = writer.save_checkpoint
    monkeypatch.setattr(writer, "save_checkpoint", lambda *args: (time.sleep(0.3), real(*args))[1])
    run(config, shards, tmp_path)
    trainer = build_trainer(config, shards)
    for _ in range(3):
        train_step(trainer)
    saved = load_checkpoint(tmp_path / "checkpoints" / "step_000003").model
    torch.testing.assert_close(saved, trainer.model.weights(), rtol=0, atol=0)
    metrics = [r["values"] for r in read_journal(tmp_path / "metrics.jsonl")[0] if r["kind"] == "metrics"]
    told = [values for values in metrics if "perf/save_stall_ms" in values]
    assert len(told) == 2
    assert all(values["perf/save_ms"] >= 300 for values in told)
    assert told[0]["perf/save_stall_ms"] < 300 < told[1]["perf/save_stall_ms"] + 300


def test_two_processes_do_not_train_in_one_directory(tmp_path):
    from gptcore import store

    with store.claim(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} is at work"), store.claim(tmp_path, 0.0):
        pass
    assert not store.is_claimed(tmp_path)


def test_evaluate_says_where_shards_are_found(tmp_path):
    with pytest.raises(UserError, match=r"--shards DIR, which `gptloom data EXPERIMENT\.yaml` prints"):
        evaluate([str(tmp_path)])

"""The studies measure what they say, at toy size."""

import gzip
import json

import pytest

from gptcore.checkpoint import Snapshot, save_checkpoint
from gptcore.config import check_config, dump_yaml
from gptcore.entry import StopFlag, recording
from gptcore.journal import read_journal
from gptcore.models import build_model
from gptcore.shards import ShardSet, prepare
from gptcore.studies.accumulation import short as accumulation
from gptcore.studies.quantization import short as quantization
from gptcore.studies.short import Subject
from gptcore.studies.sizes import baseline_config, floor_config
from gptcore.studies.timing import short as timing
from gptcore.timing import PhaseClock, format_seconds, measure_ms
from gptcore.train import build_trainer, train_loop


@pytest.fixture(scope="module")
def trained(small_text, tmp_path_factory):
    """Arguments of a study process: config, shards and the checkpoint of two steps."""
    home = tmp_path_factory.mktemp("home")
    config = check_config(
        {
            "data": {"source": str(small_text)},
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16},
            "train": {"global_batch_size": 8, "max_steps": 2, "warmup_steps": 1, "eval_tokens": 64, "device": "cpu"},
            "studies": {"repeats": 3},
        }
    )
    shards = ShardSet.open(prepare(config, home).shards)
    with recording(home / "train", "toy") as journal:
        result = train_loop(build_trainer(config, shards), journal, home / "train", StopFlag())
    (home / "config.yaml").write_text(dump_yaml(config))
    return [str(home / "config.yaml"), "--shards", str(shards.directory), "--checkpoint", result["checkpoint"]]


def run(study, trained, out):
    result = study.main([*trained, "--out", str(out), "--run", "toy/study", "--parent", "toy"])
    assert read_journal(out / "metrics.jsonl")[0][-1]["status"] == "FINISHED"
    assert (out / f"{result['study']}.json").is_file()
    assert result["conclusion"]
    return result


def test_timing_sections_add_up_to_the_step(trained, tmp_path):
    result = run(timing, trained, tmp_path)
    sections = {row["section"]: row for row in result["rows"]}
    assert sections.keys() >= {
        "data",
        "forward: attention",
        "forward: feed-forward",
        "forward: head",
        "backward",
        "clip",
        "optimizer",
        "other",
    }
    assert sum(row["share"] for row in result["rows"]) == pytest.approx(1)
    with gzip.open(tmp_path / "trace.json.gz") as trace:
        assert any("attention" in event["name"] for event in json.load(trace)["traceEvents"])
    assert all(0 <= row["low"] <= row["ms"] <= row["high"] for row in result["rows"])


def test_quantization_compares_on_the_same_tokens(trained, tmp_path):
    full, int8 = run(quantization, trained, tmp_path)["rows"]
    assert (full["weights"], int8["weights"]) == ("fp32", "int8")
    assert int8["size_mib"] < 0.5 * full["size_mib"]
    assert full["bpb_delta"] == 0
    assert 0 < abs(int8["bpb_delta"]) < 0.05
    assert min(full["tok_per_sec"], int8["tok_per_sec"]) > 0


def test_accumulation_gives_the_same_gradient_in_less_memory(trained, tmp_path):
    one, four = run(accumulation, trained, tmp_path)["rows"]
    assert (one["micro_batch_size"], four["micro_batch_size"]) == (8, 2)
    assert one["grad_difference"] == 0
    assert four["grad_difference"] < 1e-5
    assert four["peak_mib"] == pytest.approx(one["peak_mib"] / 4, rel=0.2)


def test_accumulation_reads_a_tied_head(small_text, tmp_path):
    """A checkpoint holds a tied matrix once, so lm_head.weight was found missing after the training."""
    tree = {
        "data": {"source": str(small_text)},
        "model": {"preset": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16},
        "train": {"global_batch_size": 8, "device": "cpu"},
        "studies": {"repeats": 3},
    }
    config = check_config(tree)
    prepared = prepare(config, tmp_path)
    shards = ShardSet.open(prepared.shards)
    model = build_model(config.model, shards.vocab_size)
    state = {"vocab_size": shards.vocab_size, "vocab_fingerprint": shards.fingerprint, "tokens_seen": 0}
    tokenizer = prepared.vocab / "tokenizer.json"
    path = save_checkpoint(tmp_path, Snapshot(1, model.weights(), {}, state, config, tokenizer))
    subject = Subject(config, shards, path, tmp_path)
    _, four = accumulation.measure(subject).rows
    assert four["grad_difference"] < 1e-5


def test_the_baseline_has_the_parameters_of_the_gpt():
    config = check_config({})
    gpt = build_model(config.model, 86).count_parameters()
    lstm = build_model(baseline_config(config, 86).model, 86).count_parameters()
    assert lstm == pytest.approx(gpt, rel=0.01)
    assert floor_config(config).model.family == "bigram"
    assert floor_config(config).train.max_steps == config.train.max_steps


def test_phases_pause_the_outer_one():
    clock = PhaseClock()
    with clock.phase("outer"):
        with clock.phase("inner"):
            sum(range(200_000))
        outer_so_far = clock.seconds.get("outer", 0)
    assert clock.seconds["inner"] > outer_so_far
    assert list(clock.seconds) == ["outer", "inner"]


def test_measurements_give_median_and_range():
    calls = []
    m = measure_ms(lambda: calls.append(1), lambda: None, repeats=5, warmups=2)
    assert len(calls) == 7
    assert m.low <= m.median <= m.high
    assert [format_seconds(s) for s in (5, 75, 3700)] == ["5s", "1m15s", "1h01m"]

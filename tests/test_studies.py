"""The studies measure what they say, at toy size: their short forms inside a run."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from gptcore.config import UserError, check_config, dump_yaml, load_config
from gptcore.config.switches import SHORT, STUDIES, SWITCHES
from gptcore.entry import StopFlag, recording
from gptcore.errors import EXIT_USER
from gptcore.journal import read_journal
from gptcore.models import build_model
from gptcore.report.record import read_step
from gptcore.shards import ShardSet, prepare
from gptcore.store import read_json, write_json
from gptcore.studies import engine, short
from gptcore.studies.engine import find
from gptcore.studies.sizes import baseline_config, floor_config
from gptcore.timing import PhaseClock, format_seconds, measure_ms
from gptcore.train import build_trainer, train_loop

ROOT = Path(__file__).parent.parent


def train(config, shards, home):
    with recording(home / "train", "toy") as journal:
        result = train_loop(build_trainer(config, shards), journal, home / "train", StopFlag())
    write_json(home / "train" / "result.json", result)
    (home / "config.yaml").write_text(dump_yaml(config))
    return [str(home / "config.yaml"), "--shards", str(shards.directory), "--checkpoint", result["checkpoint"]]


@pytest.fixture(scope="module")
def trained(small_text, tmp_path_factory):
    """Arguments of the process of short forms: config, shards and the checkpoint of two steps."""
    home = tmp_path_factory.mktemp("home")
    config = check_config(
        {
            "data": {"source": str(small_text)},
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16},
            "train": {"global_batch_size": 8, "max_steps": 2, "warmup_steps": 1, "eval_tokens": 64, "device": "cpu"},
            "studies": {"repeats": 3},
        }
    )
    return train(config, ShardSet.open(prepare(config, home).shards), home)


def run(study, trained, out):
    answer = short.main([trained[0], study, *trained[1:], "--out", str(out), "--run", "toy"])
    assert answer == {"studies": [study], "failed": {}}
    assert read_journal(out / study / "metrics.jsonl")[0][-1]["status"] == "FINISHED"
    result = json.loads((out / study / f"{study}.json").read_text())
    assert result == read_json(out / study / "result.json")
    assert result["study"] == study
    assert result["conclusion"]
    return result


def metrics_of(folder):
    return {
        key: v
        for line in read_journal(folder / "metrics.jsonl")[0]
        if line["kind"] == "metrics"
        for key, v in line["values"].items()
    }


def test_timing_sections_add_up_to_the_step(trained, tmp_path):
    result = run("timing", trained, tmp_path)
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
    assert result["wall_ms"] == pytest.approx(sum(row["ms"] for row in result["rows"]))
    with gzip.open(tmp_path / "timing" / "trace.json.gz") as trace:
        assert any("attention" in event["name"] for event in json.load(trace)["traceEvents"])
    assert all(0 <= row["low"] <= row["ms"] <= row["high"] for row in result["rows"])
    told = metrics_of(tmp_path / "timing")
    assert {"timing/forward_attention_ms", "timing/backward_ms", "timing/step_ms", "study/seconds"} <= told.keys()
    assert told["timing/step_ms"] == result["step_ms"] > 0


def test_quantization_compares_on_the_same_tokens(trained, tmp_path):
    full, int8 = run("quantization", trained, tmp_path)["rows"]
    assert (full["weights"], int8["weights"]) == ("fp32", "int8")
    assert int8["size_mib"] < 0.5 * full["size_mib"]
    assert full["bpb_delta"] == 0
    assert 0 < abs(int8["bpb_delta"]) < 0.05
    assert min(full["tok_per_sec"], int8["tok_per_sec"]) > 0
    assert all(row["tok_per_sec_low"] <= row["tok_per_sec"] <= row["tok_per_sec_high"] for row in (full, int8))
    assert (tmp_path / "quantization" / "model_int8.safetensors").is_file()
    told = metrics_of(tmp_path / "quantization")
    assert told["quant/bpb_delta"] == int8["bpb_delta"]
    assert {"quant/size_mib", "quant/tok_per_sec", "quant/fp32_tok_per_sec"} <= told.keys()


def test_accumulation_gives_the_same_gradient_in_less_memory(trained, tmp_path):
    one, four = run("accumulation", trained, tmp_path)["rows"]
    assert (one["micro_batch_size"], four["micro_batch_size"]) == (8, 2)
    assert one["grad_difference"] == 0
    assert four["grad_difference"] < 1e-5
    assert four["peak_mib"] == pytest.approx(one["peak_mib"] / 4, rel=0.2)
    told = metrics_of(tmp_path / "accumulation")
    assert told["accumulation/grad_difference"] == four["grad_difference"]
    assert {"accumulation/memory_ratio", "accumulation/speed_ratio"} <= told.keys()


def test_accumulation_reads_a_tied_head(small_text, tmp_path):
    """A checkpoint holds a tied matrix once, so lm_head.weight was found missing after the training."""
    tree = {
        "data": {"source": str(small_text)},
        "model": {"preset": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16},
        "train": {"global_batch_size": 8, "max_steps": 1, "warmup_steps": 0, "eval_tokens": 64, "device": "cpu"},
        "studies": {"repeats": 3},
    }
    config = check_config(tree)
    tied = train(config, ShardSet.open(prepare(config, tmp_path).shards), tmp_path)
    _, four = run("accumulation", tied, tmp_path / "run")["rows"]
    assert four["grad_difference"] < 1e-5


def test_a_study_that_fails_leaves_the_others_their_numbers(trained, tmp_path, monkeypatch):
    def broken(*_):
        raise UserError("the toy broke")

    broken_study = replace(find("accumulation"), measure=broken)
    for module in (short, engine):
        monkeypatch.setattr(module, "find", lambda name: broken_study if name == "accumulation" else find(name))
    config, *more = trained
    answer = short.main([config, "accumulation", "quantization", *more, "--out", str(tmp_path), "--run", "toy"])
    assert answer["failed"] == {"accumulation": {"error": "exactness-seed1337: the toy broke", "code": EXIT_USER}}
    assert not (tmp_path / "accumulation" / "result.json").exists()
    steps = [read_step(tmp_path / name) for name in ("accumulation", "quantization")]
    assert [step.status for step in steps] == ["failed", "done"]
    assert "the toy broke" in steps[0].reason


def test_every_study_with_a_brief_has_a_short_form_and_a_switch():
    files = {path.stem for path in (ROOT / "experiments" / "studies" / "short").glob("*.yaml")}
    assert files == set(SHORT) == {name for name in STUDIES if find(name).brief is not None}
    assert {name for name in STUDIES if name in SWITCHES} == {*SHORT, "rnn"}
    assert all(len(said) > 20 for said in STUDIES.values()), "the first line of a package's docstring says what it measures"


def test_every_study_has_a_file_and_a_deployment():
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    offered = {d["parameters"]["name"] for d in deployments if d["name"].startswith("study-")}
    files = {name for name in STUDIES if (ROOT / "experiments" / "studies" / f"{name}.yaml").is_file()}
    assert offered == files == set(STUDIES)


def test_the_baseline_has_the_parameters_of_the_gpt():
    config = check_config({})
    gpt = build_model(config.model, 86).count_parameters()
    lstm = build_model(baseline_config(config, 86).model, 86).count_parameters()
    assert lstm == pytest.approx(gpt, rel=0.01)
    assert floor_config(config).model.family == "bigram"
    assert floor_config(config).train.max_steps == config.train.max_steps


def test_the_baseline_of_the_main_job_keeps_its_width():
    config = load_config(ROOT / "experiments" / "shakespeare.yaml")
    widths = [baseline_config(config, vocab_size).model.n_embd for vocab_size in (29, 84, 86, 257, 50257)]
    assert widths == [311, 307, 307, 295, 134]
    assert build_model(baseline_config(config, 86).model, 86).count_parameters() == 809_252


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

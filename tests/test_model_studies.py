"""The quantization and the RNN study: their parts against arithmetic, and each whole at smoke size."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, users_environment

from gptcore.config import EvaluateConfig, ModelConfig, check_config
from gptcore.device import choose_device
from gptcore.evaluate import Evaluation
from gptcore.models import build_model
from gptcore.studies import Results
from gptcore.studies.quantization.cell import QuantizationOptions, delta_over_text
from gptcore.studies.quantization.summary import compare, sentence
from gptcore.studies.rnn.budget import at_budget, comparable
from gptcore.studies.rnn.carried import CarriedForward, ContiguousSampler, stream_bpb
from gptcore.studies.rnn.cell import RnnOptions, count_non_embedding, sized, state_bytes
from gptcore.studies.rnn.summary import against, summarize

V = 29


def test_contiguous_rows_go_on_where_they_ended_and_start_apart():
    sampler = ContiguousSampler(np.arange(100), 8, rows=3)
    (x, y), (following, _) = sampler.batch(0, 3), sampler.batch(3, 3)
    assert (y == x + 1).all()
    assert (following[:, 0] == y[:, -1]).all()
    assert x[:, 0].tolist() == [0, 33, 66]
    assert sampler.batch(3 * 20, 3)[0].max() < 100


def test_a_carried_forward_remembers_the_last_batch():
    torch.manual_seed(0)
    model = build_model(ModelConfig(family="gru", n_layer=1, n_embd=16, block_size=8), V)
    forward = CarriedForward(model, 2)
    x = torch.randint(V, (2, 8))
    first, second = forward(x, x, "mean")[1], forward(x, x, "mean")[1]
    assert first.item() == model(x, x)[1].item() != second.item()
    second.backward()  # not through the batch before


def stream_shards(n=1000):
    tokens = torch.randint(1, V, (n,), generator=torch.Generator().manual_seed(0)).numpy()
    return SimpleNamespace(tokens=lambda split: tokens, eot_id=0, token_bytes=np.ones(V, dtype=np.int64))


@pytest.mark.parametrize("family", ["bigram", "lstm"])
def test_streams_differ_by_the_carried_state_alone(family):
    """A model without memory cannot gain from one; a window lost or counted twice would show in the mean."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(family=family, n_layer=1, n_embd=16, block_size=8), V)
    torch.nn.init.normal_(model.wte.weight, std=2.0)
    if family == "lstm":
        torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    device, shards = choose_device("cpu", "fp32"), stream_shards()
    reset, carried = (stream_bpb(model.eval(), shards, device, is_carried=is_carried) for is_carried in (False, True))
    assert (reset == carried) == (family == "bigram")
    if family == "bigram":
        tokens = torch.from_numpy(shards.tokens("val")[: 16 * (999 // 16) + 1])
        nats = model(tokens[None, :-1], tokens[None, 1:])[1].item()
        assert reset == pytest.approx(nats / np.log(2), rel=1e-5)


@pytest.mark.parametrize("family", ["lstm", "gru", "mingru"])
def test_a_rival_has_the_references_parameters_outside_tables_and_head(family):
    config = check_config({"model": {"n_layer": 2, "n_embd": 64}})
    reference = count_non_embedding(build_model(config.model, V))
    assert reference == 2 * 12 * 64**2
    rival = sized(config, RnnOptions(family=family), V)
    assert rival.train.optimizer == "adamw"
    assert count_non_embedding(build_model(rival.model, V)) == pytest.approx(reference, rel=0.03)
    assert sized(config, RnnOptions(family="gpt"), V) == config


def test_keys_and_values_grow_and_a_state_does_not():
    device = choose_device("cpu", "fp32")
    gpt = ModelConfig(n_layer=2, n_head=2, n_embd=32)
    assert state_bytes(gpt, V, 64, device) == 2 * 2 * 32 * 64 * 4 == state_bytes(gpt, V, 32, device) * 2
    lstm = ModelConfig(family="lstm", n_layer=2, n_embd=32)
    assert state_bytes(lstm, V, 64, device) == 2 * 2 * 32 * 4 == state_bytes(lstm, V, 32, device)


def test_budgets_are_the_smallest_total_and_losses_between_points():
    line = lambda arm, flops, bpb: [  # noqa: E731
        {"cell": arm, "arm": arm, "seed": 1, "flops": f, "val_bpb": b} for f, b in zip(flops, bpb, strict=True)
    ]
    curves = pd.DataFrame(line("gpt", [0, 100, 200], [6, 4, 3]) + line("lstm", [0, 50, 150], [6, 5, 4]))
    found = at_budget(curves, "flops").set_index("arm")
    assert set(found["budget"]) == {150}
    assert found["val_bpb"].to_dict() == {"gpt": 3.5, "lstm": 4}
    rows = pd.DataFrame([{"arm": a, "seed": s, "val_bpb": b + s} for a, b in (("gpt", 1.0), ("lstm", 1.5)) for s in (1, 2, 3)])
    compared = against(rows, "gpt").set_index("arm")
    assert compared.loc["lstm", "difference"] == pytest.approx(0.5)
    assert compared.loc["lstm", "certain"]


def test_warming_up_and_the_last_evaluations_other_text_do_not_move_a_curve():
    tokens = [0, 10, 20, 30, 40]
    slow_start = {"cell": "a", "tokens": tokens, "seconds": [0, 9, 11, 13, 15], "val_bpb": [6, 3, 4, 2.5, 1]}
    steady = {"cell": "b", "tokens": tokens, "seconds": [0, 2, 4, 6, 8], "val_bpb": [6, 3, 4, 2.5, 1]}
    curves = pd.concat([pd.DataFrame(slow_start), pd.DataFrame(steady)], ignore_index=True)
    whole = comparable(curves, check_config({"train": {"eval_tokens": 0, "select": "best"}}))
    for _, line in whole.groupby("cell"):
        assert line["seconds"].tolist() == [0, 2, 4, 6, 8]
        assert line["val_bpb"].tolist() == [6, 3, 3, 2.5, 1]
    first = comparable(curves, check_config({"train": {"eval_tokens": 64, "select": "last"}}))
    assert first["val_bpb"].tolist() == 2 * [6, 3, 4, 2.5]


def test_floors_set_no_budget(tmp_path):
    """The bigram's tenth of a second was the time that all families were compared at."""

    def cell(arm, family, seed, pace):
        row = {"family": family, "val_bpb": 2.0, "flops_per_token": 1.0, "lr": 0.1, "parameters": 9}
        points = [{"tokens": t, "seconds": pace * t, "flops": 1e6 * pace * t, "val_bpb": 6 - t + 0.1 * seed} for t in range(5)]
        return {"name": f"{arm}{seed}", "arm": arm, "factors": {}, "seed": seed, "status": "done", "rows": [row]} | {
            "tables": {"curves": [] if family == "ngram" else points}
        }

    arms = {"gpt": ("gpt", 1.0), "gru": ("gru", 2.0), "bigram": ("bigram", 0.01), "5-gram": ("ngram", 0.0)}
    cells = [cell(arm, family, seed, pace) for arm, (family, pace) in arms.items() for seed in (1, 2)]
    base = check_config({"train": {"eval_tokens": 0}})
    config = SimpleNamespace(arms=[SimpleNamespace(name=arm) for arm in arms])
    plan: Any = SimpleNamespace(baseline="gpt", base=base, config=config)
    summary = summarize(Results(plan, cells, tmp_path))
    time = summary.tables["equal_time"].set_index("arm")
    assert set(time.index) == {"gpt", "gru"}
    assert time["val_bpb"].to_dict() == pytest.approx({"gpt": 2.15, "gru": 4.15})  # after 4 s: 4 and 2 tokens
    said = " ".join(summary.findings)
    assert "At equal time (4 s of training steps each) gru" in said
    assert "The floor bigram" in said
    assert "The floor 5-gram" in said
    assert summary.conclusion.startswith("The best of the others: at equal parameters")


def test_quantization_compares_seeds_with_themselves():
    """Seeds differ by more than methods do: unpaired, nothing could be said."""
    rows = pd.DataFrame(
        [
            {
                "arm": arm,
                "seed": seed,
                "size_mib": size,
                "val_bpb": seed + cost,
                "decode_1": speed * seed,
                "decode_1_speedup": speed / 10,
            }
            for arm, size, cost, speed in (("fp32", 4.0, 0.0, 10.0), ("int8", 1.0, 0.001, 39.0))
            for seed in (1, 2, 3)
        ]
    )
    row = compare(rows, "fp32", ["decode_1"]).iloc[0]
    assert (row["size_ratio"], row["decode_1_ratio"], row["bpb_delta"]) == pytest.approx((0.25, 3.9, 0.001))
    said = sentence(row, ["decode_1"])
    assert "25.0 % of the bytes" in said
    assert "3.90 times" in said
    assert "+0.0010 bits per byte (n=3" in said
    assert "95 % interval +0.0010 to +0.0010" in said
    one = rows[rows["seed"] == 1].assign(text_low=0.0004, text_high=0.0016)
    said = sentence(compare(one, "fp32", ["decode_1"]).iloc[0], ["decode_1"])
    assert "(n=1, 95 % interval over texts +0.0004 to +0.0016)" in said
    assert "(no interval)" in said  # of the speed
    with pytest.raises(ValueError, match="no such method"):
        QuantizationOptions(method="int3")


def test_a_loss_is_paired_by_document():
    """Documents differ by far more than a method changes any of them: unpaired, the interval would hold nothing but that."""
    documents, difficulty = np.arange(40), np.linspace(10, 500, 40)
    full = Evaluation(1.0, 1, difficulty, np.full(40, 100.0), np.zeros(1), documents)
    small = dataclasses.replace(full, record_nats=difficulty + np.tile([0.1, 0.3], 20))
    interval = delta_over_text(small, full, EvaluateConfig())
    lost = 0.2 / (100 * math.log(2))
    assert 0.5 * lost < interval["text_low"] < lost < interval["text_high"] < 1.5 * lost
    assert delta_over_text(small, full, EvaluateConfig(bootstrap=0)) == {}


def run_smoke(name: str, home: Path, text: Path, *more: str) -> tuple[dict[str, Any], Path]:
    command = [sys.executable, "-m", "gptcore.studies", name, "--smoke", f"data.source={text}", "train.device=cpu", *more]
    done = subprocess.run(command, cwd=ROOT, env=users_environment(home), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["failed"], result["not_run"]) == (0, 0), done.stderr
    return result, home / "runs" / result["run"]


@pytest.mark.integration
def test_the_quantization_study_from_one_command(home, small_text):
    result, run = run_smoke("quantization", home, small_text, "study.seeds=[1]")
    assert "% of the bytes" in result["conclusion"]
    rows = pd.read_parquet(run / "tables" / "results.parquet").set_index("arm")
    assert rows.loc["int4 GPTQ", "size_mib"] < rows.loc["int8", "size_mib"] < 0.4 * rows.loc["fp32", "size_mib"]
    layers = pd.read_parquet(run / "tables" / "layers.parquet")
    assert set(layers["layer"]) >= {"lm_head", "transformer.h.0.attn.c_attn"}
    ages = pd.read_parquet(run / "tables" / "ages.parquet")
    assert set(ages["step"]) == {5, 10}
    html = (run / "report.html").read_text()
    for words in ("Damage against training length", "One matrix at a time", "Texts, from the same random numbers"):
        assert words in html


@pytest.mark.integration
def test_the_rnn_study_from_one_command(home, small_text):
    result, run = run_smoke("rnn", home, small_text, "study.seeds=[1]")
    assert "The best of the others" in result["conclusion"]
    for table in ("equal_parameters_equal_tokens", "equal_FLOPs", "equal_time", "sizes", "states"):
        assert len(pd.read_parquet(run / "tables" / f"{table}.parquet")) >= 2, table
    flops = pd.read_parquet(run / "tables" / "equal_FLOPs.parquet")
    assert set(flops["arm"]) == {"gpt", "lstm", "mingru"}
    html = (run / "report.html").read_text()
    for words in ("Loss by position", "Memory of decoding", "Carried against reset state"):
        assert words in html

"""What is recited, and the memorization study: the one forward pass against greedy decoding, intervals, length, sentences, the whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from test_model_studies import run_smoke

from gptcore.config import ModelConfig, UserError, check_config
from gptcore.device import choose_device
from gptcore.generate import generate
from gptcore.models import build_model
from gptcore.reciting import recite
from gptcore.studies import Results
from gptcore.studies.memorization.cell import lengthened, recited_share
from gptcore.studies.memorization.options import MemorizationOptions
from gptcore.studies.memorization.summary import summarize

V, T = 11, 16


def test_one_pass_over_the_text_tells_what_greedy_decoding_would_write():
    """A text that the model wrote itself in every other window, and noise between: each prompt is continued, token by token."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=T, zero_init=False), V).eval()
    prompt, n, rng = 4, 8, torch.Generator()
    tokens = torch.randint(V, (12 * (T + 1),))
    for start in range(0, len(tokens), 2 * (T + 1)):
        tokens[start + prompt : start + prompt + n] = generate(
            model, tokens[None, start : start + prompt], n, rng, temperature=0
        )[0]
    shards: Any = SimpleNamespace(tokens=lambda split: tokens.numpy(), token_bytes=np.ones(V, dtype=np.int64))
    recital = recite(model, shards, "train", choose_device("cpu", "fp32"), 12)
    windows = torch.stack([tokens[start : start + T + 1] for start in recital.starts])
    written = generate(model, windows[:, :prompt], n, rng, temperature=0)
    expected = (written == windows[:, prompt : prompt + n]).all(1).tolist()
    assert recital.is_continued(prompt, n).tolist() == expected
    assert True in expected
    assert False in expected


def test_the_interval_draws_whole_documents_and_leaves_out_records_without_a_prompt():
    """Prompts of a document are alike: drawn one by one they would look like so many independent ones."""
    config = check_config({"evaluate": {"bootstrap": 500}})
    index = np.stack([np.arange(0, 1300, 50), np.arange(26) // 2, np.full(26, 50), np.zeros(26, dtype=int)], axis=1)
    starts = np.arange(0, 1200, 10)  # the last document has no prompt
    is_recited = (starts // 100) % 2 == 0  # whole documents
    found = recited_share(is_recited, starts, index, config, "train_recited")
    assert found["train_recited"] == 0.5
    assert 0.0 <= found["train_recited_low"] < 0.3 < 0.7 < found["train_recited_high"] <= 1.0
    assert recited_share(is_recited[:3], starts[:3], index, config, "x") == {"x": 1.0}, "one section has no interval"


def test_a_training_is_as_long_as_its_passes_and_keeps_every_age():
    settings = {"global_batch_size": 20, "max_tokens": 7, "warmup_steps": 5}
    config = check_config({"model": {"block_size": 64}, "train": settings})
    train = lengthened(config, MemorizationOptions(passes=6, ages=4), 6400).train
    assert (train.max_steps, train.max_tokens, train.save_interval, train.keep_checkpoints) == (30, None, 8, 4)
    with pytest.raises(UserError, match=r"are 66 tokens, more than model.block_size \+ 1 = 65; lower them"):
        lengthened(config, MemorizationOptions(prompt_tokens=33, recited_tokens=33), 6400)


def results_of(*cells: tuple[str, int, float, float]) -> Results:
    """Two ages a cell, the older first: (arm, seed, recited of training text, of held-out text)."""

    def age(step: int, train: float, val: float) -> dict[str, Any]:
        row = {"step": step, "tokens_seen": 100 * step, "passes": float(step), "prompt_tokens": 32, "recited_tokens": 24}
        row |= {"train_recited": train, "train_recited_low": train - 0.1, "train_recited_high": train + 0.1, "val_recited": val}
        return row | {"train_bpb": 1.0, "val_bpb": 2.0, "train_in_runs": train, "val_in_runs": val}

    records = [
        {"name": f"{arm}-{seed}", "arm": arm, "factors": {}, "seed": seed, "status": "done", "tables": {}}
        | {"rows": [age(2, train, val), age(1, 0.0, 0.0)]}
        for arm, seed, train, val in cells
    ]
    records.append({"name": "often-9", "arm": "often", "factors": {}, "seed": 9, "status": "failed", "rows": [], "tables": {}})
    arms = [SimpleNamespace(name="once"), SimpleNamespace(name="often")]
    plan: Any = SimpleNamespace(config=SimpleNamespace(arms=arms))
    return Results(plan, records, Path())


def test_the_sentence_is_of_the_oldest_age_beside_held_out_text():
    several = summarize(
        results_of(("once", 1, 0.1, 0.1), ("often", 1, 0.6, 0.1), ("often", 2, 0.8, 0.1), ("often", 3, 0.7, 0.1))
    )
    assert several.conclusion == (
        "After 2 passes over its training text, the model of often recites 70.0 % (n=3, 95 % interval 45.2 to 94.8 %) of prompts from it "
        "word for word for 24 tokens, and 10.0 % of those from held-out text."
    )
    assert several.metrics["memorization/memorized/often"] == pytest.approx(0.6)
    assert len(several.findings) == 1
    alone = summarize(results_of(("once", 1, 0.5, 0.1)))
    assert "50.0 % (n=1, 95 % interval over prompts 40.0 to 60.0 %)" in alone.conclusion


@pytest.mark.integration
def test_the_memorization_study_from_one_command(home, small_text):
    result, run = run_smoke("memorization", home, small_text, "study.seeds=[1]")
    assert "passes over its training text" in result["conclusion"]
    rows = pd.read_parquet(run / "tables" / "results.parquet")
    assert rows.groupby("arm")["step"].nunique().to_dict() == {"once": 2, "often": 4}
    assert rows["train_recited"].between(0, 1).all()
    assert "Recited by age" in (run / "report.html").read_text()

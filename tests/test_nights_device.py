"""The device's part of a night: a warm start, what is recited, what is unreadable; on a toy trained in a second.

.venv/bin/pytest tests/test_nights_device.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gptcore.config import ExperimentConfig, UserError, check_config, with_changes
from gptcore.corpus.selection import select_segments
from gptcore.device import choose_device
from gptcore.entry import StopFlag
from gptcore.evaluate import SplitView
from gptcore.journal import NoJournal
from gptcore.models import LanguageModel
from gptcore.reciting import recite
from gptcore.shards import ShardSet, prepare
from gptcore.store import read_manifest
from gptcore.train import build_trainer, train_loop


@pytest.fixture(scope="module")
def config(small_text: Path) -> ExperimentConfig:
    return check_config(
        {
            "data": {"source": str(small_text)},
            "model": {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 16},
            "train": {"global_batch_size": 8, "max_steps": 3, "warmup_steps": 1, "eval_tokens": 64, "device": "cpu"},
        }
    )


@pytest.fixture(scope="module")
def shards(config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(prepare(config, tmp_path_factory.mktemp("home")).shards)


def test_a_warm_start_begins_where_the_other_run_ended(config: ExperimentConfig, shards: ShardSet, tmp_path: Path) -> None:
    """Random weights in an arm called warm would look like a fair comparison."""
    trainer = build_trainer(config, shards)
    checkpoint = train_loop(trainer, NoJournal(), tmp_path, StopFlag())["checkpoint"]
    warm = build_trainer(with_changes(config, train={"init_from": checkpoint, "seed": 5}), shards)
    for name, tensor in trainer.model.weights().items():
        assert torch.equal(warm.model.weights()[name], tensor), name
    assert warm.step == 0
    with pytest.raises(UserError, match=r"train.init_from=.*a model of another shape"):
        build_trainer(with_changes(config, train={"init_from": checkpoint}, model={"n_embd": 32}), shards)


class Knows(LanguageModel):
    """Writes a cycle of ids for ever: 0, 1, 2, …, V − 1, 0, …"""

    block_size, vocab_size = 16, 8

    def forward(self, idx, targets=None, **kwargs):  # type: ignore[no-untyped-def]
        return torch.nn.functional.one_hot((idx + 1) % self.vocab_size, self.vocab_size).float(), None


class Toy:
    """Ids as a shard set holds them: the cycle to learn from, noise held out."""

    token_bytes = np.ones(8, dtype=np.int64)

    def tokens(self, split: str) -> np.ndarray:
        return np.arange(400) % 8 if split == "train" else np.random.default_rng(0).integers(0, 8, 400)


def test_recited_text_is_found_and_other_text_is_not() -> None:
    device = choose_device("cpu", "fp32")
    assert recite(Knows(), Toy(), "train", device).share == 1.0
    assert recite(Knows(), Toy(), "val", device).share == 0.0


def test_a_shuffled_view_keeps_every_record(shards: ShardSet) -> None:
    """Ids that wander between records, or an end of text among them, would judge another text than the one that came."""
    plain, shuffled = (SplitView(shards, "val", is_shuffled=how) for how in (False, True))
    index = plain.index("val")
    assert np.array_equal(index, shuffled.index("val"))
    for begin, end in zip(index[:, 0], [*index[1:, 0], len(plain.tokens("val"))], strict=True):
        one, other = (view.tokens("val")[begin:end] for view in (plain, shuffled))
        assert one[0] == other[0] == shards.eot_id
        assert np.array_equal(np.sort(one), np.sort(other))
    assert not np.array_equal(plain.tokens("val"), shuffled.tokens("val"))


def test_a_selection_is_the_corpus_of_these_segments(config: ExperimentConfig, tmp_path: Path) -> None:
    """The corpus a night trains on without a refused segment must be the one that never saw it."""
    from gptcore.corpus import build_corpus

    inbox, home = tmp_path / "inbox", tmp_path / "home"
    inbox.mkdir()
    words = Path(config.data.source).read_text(encoding="utf-8")
    (inbox / "a.txt").write_text(words[:30_000])
    data = config.data.model_copy(update={"source": str(inbox)})
    first = build_corpus(data, home)
    (inbox / "b.txt").write_text(words[30_000:])
    both = build_corpus(data, home)
    segments = read_manifest(both)["segments"]
    assert len(segments) == 2
    assert select_segments(both, segments[:1], home) == first
    alone = read_manifest(select_segments(both, segments[1:], home))
    assert alone["bytes"] == read_manifest(both)["bytes"] - read_manifest(first)["bytes"]

"""Recurrences and counts against their definitions: minGRU's scan, the n-gram's smoothing, states that are carried."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from gptcore.checkpoint import Snapshot, load_model, save_checkpoint
from gptcore.config import ExperimentConfig, ModelConfig, UserError
from gptcore.generate import generate
from gptcore.models import build_model
from gptcore.models.mingru import scan
from gptcore.models.rnn import RecurrentState
from gptcore.vocab.kinds import CharVocab

V, ORDER = 7, 3


def recurrence(gate, candidate, h):
    states = []
    for t in range(gate.size(1)):
        z, x = gate[:, t].sigmoid(), candidate[:, t]
        g = torch.where(x >= 0, x + 0.5, x.sigmoid())
        h = (1 - z) * h + z * g
        states.append(h)
    return torch.stack(states, 1)


@pytest.mark.parametrize("is_carried", [False, True])
def test_the_scan_is_the_recurrence(is_carried):
    torch.manual_seed(0)
    gate, candidate = 4 * torch.randn(2, 2, 300, 5)
    h = torch.rand(2, 1, 5) if is_carried else None
    expected = recurrence(gate, candidate, h[:, 0] if is_carried else torch.zeros(2, 5))
    torch.testing.assert_close(scan(gate, candidate, h), expected, rtol=1e-4, atol=1e-5)


def test_the_scan_survives_gates_that_are_shut_or_open():
    """Sums of logarithms that leave float32's range would be infinite or not a number, forward or backward."""
    gate = torch.tensor([[-80.0, 80.0] * 200]).T[None].expand(1, 400, 3).clone().requires_grad_()
    candidate = torch.linspace(-50, 50, 400)[None, :, None].expand(1, 400, 3)
    states = scan(gate, candidate, None)
    torch.testing.assert_close(states, recurrence(gate, candidate, torch.zeros(1, 3)), rtol=1e-3, atol=1e-4)
    states.sum().backward()
    assert gate.grad.isfinite().all()


@pytest.mark.parametrize("family", ["lstm", "gru", "mingru"])
def test_a_carried_state_is_memory_without_gradient(family):
    torch.manual_seed(0)
    model = build_model(ModelConfig(family=family, n_layer=2, n_embd=16, block_size=8), V)
    idx, state = torch.randint(V, (2, 8)), RecurrentState()
    before = model(idx)[0]
    model(idx, cache=state)
    state.detach()
    logits = model(idx, cache=state)[0]
    assert not torch.allclose(before, logits)
    logits.sum().backward()  # would fail through a graph that is gone


def text(n=400):
    rng = np.random.default_rng(0)
    return rng.choice(V, n, p=[0.4, 0.2, 0.15, 0.1, 0.08, 0.07, 0.0]).astype(np.int64)


def fitted(order=ORDER):
    model = build_model(ModelConfig(family="ngram", order=order, block_size=16), V)
    model.fit(text())
    return model.eval()


def kneser_ney(tokens, context, order):
    """Straight from the formula, with dictionaries."""
    grams = {order: Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))}
    for k in range(order - 1, 0, -1):
        grams[k] = Counter(gram[1:] for gram in grams[k + 1])
    p = np.full(V, 1 / V)
    for k in range(1, min(order, len(context) + 1) + 1):
        values = list(grams[k].values())
        discount = values.count(1) / (values.count(1) + 2 * values.count(2)) if 1 in values else 0.5
        after = {g[-1]: c for g, c in grams[k].items() if g[:-1] == tuple(context[len(context) - k + 1 :])}
        if after:
            total = sum(after.values())
            p = np.array([max(after.get(v, 0) - discount, 0) / total for v in range(V)]) + p * discount * len(after) / total
    return p


def test_the_ngram_is_interpolated_kneser_ney():
    model, tokens = fitted(), text()
    idx = torch.tensor([[0, 1, 6, 2, 0, 0, 3, 1]])  # 6 was never seen
    logits = model(idx)[0]
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(1, 8))
    for t in range(8):
        expected = kneser_ney(tokens.tolist(), idx[0, : t + 1].tolist(), ORDER)
        assert logits[0, t].exp().numpy() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("order", range(1, 7))
def test_a_text_shorter_than_the_context_is_read(order):
    """Decoding starts with one token: an order of 5 then looked for tokens before the text and failed."""
    model = fitted(order)
    idx = torch.tensor([[0, 1, 2, 0, 0, 3, 1, 0]])
    cache = model.new_cache(1)
    one_by_one = [model(token, cache=cache)[0] for token in idx.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(one_by_one, 1), model(idx)[0])


def test_the_ngram_keeps_the_contract_and_its_file(tmp_path):
    model = fitted()
    idx = torch.randint(V - 1, (3, 12), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(3)
    parts = [model(piece, cache=cache)[0] for piece in idx.split([1, 1, 6, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(idx)[0])
    targets = idx.roll(-1, 1)
    targets[:, -1] = -1
    each = model(idx, targets, reduction="none")[1]
    assert (each[:, -1] == 0).all()
    torch.testing.assert_close(model(idx, targets)[1], each.sum() / 33)
    vocab = CharVocab([chr(97 + i) for i in range(V - 2)])
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocab.to_json()))
    state = {"vocab_size": V, "vocab_fingerprint": vocab.fingerprint, "tokens_seen": 400}
    config = ExperimentConfig(model=model.config)
    path = save_checkpoint(tmp_path, Snapshot(0, model.weights(), {}, state, config, tmp_path / "tokenizer.json"))
    loaded = load_model(path)[0]
    assert torch.equal(loaded(idx)[0], model(idx)[0])
    assert generate(loaded, idx, 9, torch.Generator().manual_seed(0)).max() < V
    assert loaded.count_parameters() == model.count_parameters() > V


def test_longer_contexts_help_and_too_long_ones_are_refused():
    tokens = np.tile([0, 1, 0, 2], 100)
    losses = []
    for order in (1, 2, 3):
        model = build_model(ModelConfig(family="ngram", order=order, block_size=16), V)
        model.fit(tokens)
        idx = torch.from_numpy(tokens[None, :17])
        losses.append(model(idx[:, :-1], idx[:, 1:])[1].item())
    assert losses[0] > losses[1] + 0.3
    assert losses[1] > losses[2] + 0.2
    assert losses[0] == pytest.approx(math.log(3), abs=0.2)
    with pytest.raises(UserError, match=r"model\.order=12"):
        build_model(ModelConfig(family="ngram", order=12), 50_257)

"""The models against naive references: attention, causality, caches, counts."""

import math

import pytest
import torch
import torch.nn.functional as F

from gptcore.config import ModelConfig, UserError
from gptcore.models import build_model
from gptcore.models.layers import apply_rotary, rms_norm, rotary_table
from gptcore.studies.rnn import estimate_gpt_parameters, estimate_lstm_parameters

V, T = 29, 16
CONFIGS = {
    "gpt": ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=T),
    "lstm": ModelConfig(family="lstm", n_layer=2, n_embd=24, block_size=T),
    "bigram": ModelConfig(family="bigram", block_size=T),
}


def make(family, *, trained=True):
    torch.manual_seed(0)
    model = build_model(CONFIGS[family], V)
    if trained:  # zero-initialised projections would hide mistakes
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokens(batch=3, length=T):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(1))


def test_attention_equals_a_naive_masked_softmax():
    model = make("gpt")
    attention = model.h[0].attn
    x = torch.randn(2, T, 32)
    rotary = rotary_table(T, 16)
    q, k, v = (p.view(2, T, 2, 16).transpose(1, 2) for p in attention.c_attn(x).split(32, dim=2))
    q, k = apply_rotary(rms_norm(q), *rotary), apply_rotary(rms_norm(k), *rotary)
    scores = (q @ k.mT / math.sqrt(16)).masked_fill(torch.ones(T, T).tril() == 0, float("-inf"))
    naive = attention.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, T, 32))
    torch.testing.assert_close(attention(x, rotary, None, 0), naive)


def test_rotary_scores_depend_on_distance_only():
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    cos, sin = rotary_table(20, 8)
    at = lambda x, i: apply_rotary(x, cos[i : i + 1], sin[i : i + 1])  # noqa: E731
    torch.testing.assert_close((at(q, 3) * at(k, 1)).sum(), (at(q, 12) * at(k, 10)).sum())


@pytest.mark.parametrize("family", CONFIGS)
def test_the_future_changes_nothing_earlier(family):
    model, idx = make(family), tokens()
    changed = idx.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % V
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("pieces", [[1] * T, [5, 1, 10], [T]])
def test_a_cache_gives_the_logits_of_the_whole_text(family, pieces):
    model, idx = make(family), tokens()
    cache = model.new_cache(3)
    parts = [model(piece, cache=cache)[0] for piece in idx.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(idx)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_reductions_agree_and_ignored_targets_do_not_count(family):
    model, idx = make(family), tokens()
    targets = idx.roll(-1, 1)
    targets[:, -5:] = -1
    each = model(idx, targets, reduction="none")[1]
    assert each.shape == (3, T)
    assert (each[:, -5:] == 0).all()
    torch.testing.assert_close(model(idx, targets, reduction="sum")[1], each.sum())
    torch.testing.assert_close(model(idx, targets)[1], each.sum() / (3 * (T - 5)))
    reference = F.cross_entropy(model(idx)[0][:, :-5].reshape(-1, V), targets[:, :-5].reshape(-1))
    torch.testing.assert_close(model(idx, targets)[1], reference)


@pytest.mark.parametrize("family", CONFIGS)
def test_an_untrained_model_guesses_uniformly(family):
    idx = tokens(16)
    loss = make(family, trained=False)(idx, idx.roll(-1, 1))[1].item()
    assert loss == pytest.approx(math.log(V), rel=0.05)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_parameter_gets_a_gradient(family):
    model, idx = make(family), tokens()
    model(idx, idx.roll(-1, 1))[1].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_parameters_and_flops_match_a_hand_count():
    gpt = make("gpt")
    blocks = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128)
    assert gpt.count_parameters() == blocks + 2 * V * 32 == estimate_gpt_parameters(2, 32, V)
    assert gpt.flops_per_token() == 6 * (blocks + V * 32) + 12 * 2 * 32 * T
    assert make("lstm").count_parameters() == estimate_lstm_parameters(2, 24, V)
    assert make("bigram").count_parameters() == V * V


def test_a_padding_smaller_than_the_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"model\.padded_vocab_size=20"):
        build_model(ModelConfig(padded_vocab_size=20), 21)

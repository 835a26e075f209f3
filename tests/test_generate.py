"""Sampling: caches change nothing, the context may run over, seeds repeat, eight bits stay close."""

import pytest
import torch

from gptcore.config import ModelConfig
from gptcore.generate import generate, pick_next
from gptcore.models import build_model
from gptcore.quantize import Int8Linear, quantize_int8, quantize_rows

V, T = 29, 16


@pytest.fixture(params=["gpt", "lstm", "bigram"])
def model(request):
    torch.manual_seed(0)
    model = build_model(ModelConfig(family=request.param, n_layer=2, n_head=2, n_embd=32, block_size=T), V)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_greedy_decoding_equals_recomputing_the_context(model):
    idx = torch.tensor([[1, 2, 3]])
    expected = idx
    with torch.no_grad():
        for _ in range(10):
            expected = torch.cat((expected, model(expected)[0][:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generate(model, idx, 10, rng(), temperature=0), expected[:, 3:])


def test_text_may_be_longer_than_the_context(model):
    out = generate(model, torch.zeros(2, 1, dtype=torch.int64), 3 * T + 5, rng())
    assert out.shape == (2, 3 * T + 5)
    assert out.max() < V


def test_seeds_repeat_and_differ(model):
    idx = torch.zeros(1, 1, dtype=torch.int64)
    assert torch.equal(generate(model, idx, 30, rng(1)), generate(model, idx, 30, rng(1)))
    assert not torch.equal(generate(model, idx, 30, rng(1)), generate(model, idx, 30, rng(2)))


def test_top_k_and_padding_rows_are_never_drawn(model):
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).repeat(200, 1)
    assert set(pick_next(logits, 1.0, 2, rng()).flatten().tolist()) == {1, 2}
    assert generate(model, torch.zeros(8, 1, dtype=torch.int64), 40, rng(), vocab_size=5).max() < 5


def test_int8_rounds_each_weight_by_at_most_half_a_step():
    weight = torch.randn(7, 13, generator=rng())
    weight[3] = 0
    quantized, scale = quantize_rows(weight)
    assert quantized.dtype == torch.int8
    assert ((quantized * scale[:, None] - weight).abs() <= scale[:, None] / 2 + 1e-7).all()


@pytest.mark.parametrize("rows", [1, 4, 5, 64])
def test_int8_linear_is_close_at_every_number_of_rows(rows):
    """Few rows take another kernel than many."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, bias=False)
    x = torch.randn(rows, 64)
    difference = (Int8Linear(linear)(x) - linear(x)).norm() / linear(x).norm()
    assert 0 < difference < 0.02


def test_a_quantized_model_keeps_the_contract_and_the_original():
    torch.manual_seed(0)
    model = build_model(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=T), V).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = quantize_int8(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {t.dtype for n, t in small.state_dict().items() if n.endswith("c_fc.weight")} == {torch.int8}
    idx = torch.zeros(1, 1, dtype=torch.int64)
    assert generate(small, idx, 20, rng()).shape == (1, 20)

"""Sampling: caches change nothing, the context may run over, seeds repeat, draws follow the probabilities."""

import pytest
import torch

from gptcore.config import ModelConfig
from gptcore.decoding import FlatDecoder, start_decoding
from gptcore.generate import generate, pick_next
from gptcore.models import build_model
from gptcore.models.build import MODELS
from gptcore.quantize import METHODS, quantize

V, T = 29, 16


@pytest.fixture(params=[family for family, model in MODELS.items() if model.is_trained])
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


def test_draws_follow_the_probabilities_and_skip_impossible_ids():
    """A look-up in running sums that is off by one, or that ends beyond the last possible id."""
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = pick_next(probabilities.log().repeat(20_000, 1), 1.0, None, rng()).flatten()
    shares = torch.bincount(drawn, minlength=6) / len(drawn)
    assert (shares[probabilities == 0] == 0).all()
    torch.testing.assert_close(shares, probabilities, atol=0.02, rtol=0)
    assert set(pick_next(torch.tensor([[0.0, -1.0]]), 0.0, None, rng()).flatten().tolist()) == {0}


@pytest.mark.parametrize("method", [None, "bf16", "int8", "int8-dynamic", "int4", "fp8"])
@pytest.mark.parametrize("preset", ["modern", "gpt2", "classic"])
def test_one_flat_loop_gives_the_same_bits_as_the_modules(preset, method):
    torch.manual_seed(0)
    model = build_model(ModelConfig(preset=preset, n_layer=2, n_head=2, n_embd=64, block_size=T, softcap=5.0), V).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if method is not None:
        model = quantize(model, METHODS[method])
    idx = torch.randint(V, (3, T))
    step, cache = start_decoding(model, 3, T, lambda logits: logits, rng()), model.new_cache(3)
    assert isinstance(step, FlatDecoder)
    with torch.inference_mode():
        for piece in (idx[:, :4], *idx[:, 4:9].split(1, dim=1), idx[:, 9:12], *idx[:, 12:].split(1, dim=1)):
            assert torch.equal(step(piece), model(piece, cache=cache)[0][:, -1])


def test_a_model_that_is_watched_decodes_by_its_modules():
    model = build_model(ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=T), V).eval()
    seen = []
    model.transformer.h[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    generate(model, torch.zeros(1, 1, dtype=torch.int64), 5, rng())
    assert len(seen) == 5

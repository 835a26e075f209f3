"""The models against naive references: attention, causality, caches, counts."""

import math

import pytest
import torch
import torch.nn.functional as F

from gptcore.config import ModelConfig, UserError
from gptcore.config.model import FAMILIES
from gptcore.models import build_model, losses
from gptcore.models.build import MODELS
from gptcore.models.cache import FixedCache
from gptcore.models.fp8 import use_fp8
from gptcore.models.layers import apply_rotary, attend_once, rms_norm, rotary_table
from gptcore.studies.sizes import estimate_gpt_parameters, estimate_lstm_parameters

V, T = 29, 16
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": T}
CONFIGS = {
    "modern": ModelConfig(**SMALL),
    "gpt2": ModelConfig(preset="gpt2", **SMALL),
    "classic": ModelConfig(preset="classic", **SMALL),
}
CONFIGS |= {
    family: ModelConfig(family=family, n_layer=2, n_embd=24, block_size=T)
    for family, model in MODELS.items()
    if model.is_trained and family != "gpt"
}
GPTS = ["modern", "gpt2", "classic"]


def test_every_family_has_a_class_and_a_name_for_people():
    assert list(FAMILIES) == list(MODELS)


def make(name, *, trained=True, **changes):
    torch.manual_seed(0)
    config = ModelConfig(**(CONFIGS[name].model_dump() | changes))
    model = build_model(config, V)
    if trained:  # zero-initialised projections would hide mistakes
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokens(batch=3, length=T):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["lstm", "mingru"])
def test_gpt2s_initial_weights_of_a_recurrent_model(name):
    made = make(name, trained=False, init="normal", n_embd=64)
    for key, module in made.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            expected = 0.02 / math.sqrt(2 * 2) if key.endswith("c_proj") else 0.02
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1), key
    loss = made(tokens(), tokens())[1]
    assert loss.item() == pytest.approx(math.log(V), abs=0.1)


@pytest.mark.parametrize("name", GPTS)
def test_attention_equals_a_naive_masked_softmax(name):
    attention = make(name).transformer.h[0].attn
    x = torch.randn(2, T, 32)
    rotary = rotary_table(T, 16) if name == "modern" else None
    q, k, v = (p.view(2, T, 2, 16).transpose(1, 2) for p in attention.c_attn(x).split(32, dim=2))
    if name == "modern":
        q, k = apply_rotary(rms_norm(q), *rotary), apply_rotary(rms_norm(k), *rotary)
    scores = (q @ k.mT / math.sqrt(16)).masked_fill(torch.ones(T, T).tril() == 0, float("-inf"))
    naive = attention.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, T, 32))
    torch.testing.assert_close(attention(x, rotary, None, 0), naive, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_double_precision_stays_double(cached):
    """Attention on a CPU turns 16 bits into 32, for speed; doing so with 64 spoiled the study that measures exactness."""
    model = make("modern").double()
    model.transformer.cos, model.transformer.sin = (t.double() for t in rotary_table(T, 16))
    single = make("modern")
    a = model(tokens(), cache=model.new_cache(3) if cached else None)[0]
    assert a.dtype == torch.float64
    hidden = model.transformer.h[0].attn(torch.randn(2, T, 32, dtype=torch.float64), None, None, 0)
    assert (hidden != hidden.float().double()).any()
    torch.testing.assert_close(a.float(), single(tokens())[0], rtol=1e-3, atol=1e-3)


def test_post_norm_is_add_and_norm_and_pre_norm_leaves_the_stream_alone():
    x = torch.randn(2, T, 32)
    post, pre = make("classic").transformer.h[0], make("gpt2").transformer.h[0]
    y = F.layer_norm(x + post.attn(x, None, None, 0), (32,), post.ln_1.weight, post.ln_1.bias)
    torch.testing.assert_close(post(x, None, None, 0), post.ln_2(y + post.mlp(y)))
    y = x + pre.attn(F.layer_norm(x, (32,), pre.ln_1.weight, pre.ln_1.bias), None, None, 0)
    torch.testing.assert_close(pre(x, None, None, 0), y + pre.mlp(pre.ln_2(y)))


def test_rotary_scores_depend_on_distance_only():
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    cos, sin = rotary_table(20, 8)
    at = lambda x, i: apply_rotary(x, cos[i : i + 1], sin[i : i + 1])  # noqa: E731
    torch.testing.assert_close((at(q, 3) * at(k, 1)).sum(), (at(q, 12) * at(k, 10)).sum())


@pytest.mark.parametrize("family", list(CONFIGS))
def test_the_future_changes_nothing_earlier(family):
    model, idx = make(family), tokens()
    changed = idx.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % V
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("pieces", [[1] * T, [5, 1, 10], [T]])
def test_a_cache_gives_the_logits_of_the_whole_text(family, pieces):
    model, idx = make(family), tokens()
    cache = model.new_cache(3)
    parts = [model(piece, cache=cache)[0] for piece in idx.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(idx)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", ["modern", "gpt2", "classic"])
@pytest.mark.parametrize("pieces", [[1] * T, [5, *[1] * (T - 5)], [5, 1, 4, *[1] * (T - 10)]])
def test_a_cache_that_never_moves_gives_the_same_logits(preset, pieces):
    """Its room is larger than what it holds, and a single token's mask comes from the length on the device."""
    model, idx = make(preset), tokens()
    model.block_size = 200
    cache = FixedCache(200, T, torch.device("cpu"))
    parts = [model(piece, cache=cache)[0] for piece in idx.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(idx)[0], rtol=1e-4, atol=1e-4)
    assert cache.keys[0].size(2) == cache.room == 64


def test_attention_of_one_query_written_out_is_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    for mask in (None, (torch.arange(20) < 7)[None]):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(attend_once(q, k, v, mask), expected)


@pytest.mark.parametrize("family", list(CONFIGS))
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


@pytest.mark.parametrize("family", list(CONFIGS))
def test_an_untrained_model_guesses_uniformly(family):
    idx = tokens(16)
    loss = make(family, trained=False)(idx, idx.roll(-1, 1))[1].item()
    assert loss == pytest.approx(math.log(V), rel=0.05)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_every_parameter_gets_a_gradient(family):
    model, idx = make(family), tokens()
    model(idx, idx.roll(-1, 1))[1].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_parameters_and_flops_match_a_hand_count():
    matrices = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128)
    assert make("modern").count_parameters() == matrices + 2 * V * 32
    assert make("modern").flops_per_token() == 6 * (matrices + V * 32) + 12 * 2 * 32 * T
    small = 2 * (96 + 32 + 128 + 32 + 4 * 32)  # biases of the linear layers, gain and bias of two norms, in each block
    assert make("gpt2").count_parameters() == matrices + V * 32 + T * 32 + small + 2 * 32
    assert make("gpt2").flops_per_token() == make("modern").flops_per_token()
    assert make("classic").count_parameters() == matrices + 2 * V * 32 + T * 32 + small
    for name in GPTS:
        assert make(name).count_parameters() == estimate_gpt_parameters(CONFIGS[name], V)
    assert make("lstm").count_parameters() == estimate_lstm_parameters(2, 24, V)
    assert make("bigram").count_parameters() == V * V


def test_gpt2_has_the_published_number_of_parameters():
    config = ModelConfig(preset="gpt2", n_layer=12, n_head=12, n_embd=768, block_size=1024)
    with torch.device("meta"):
        model = build_model(config, 50257)
    assert model.count_parameters() == 124_439_808 == estimate_gpt_parameters(config, 50257)
    # Chinchilla's table and nanoGPT count 6N + 12·L·C·T with N = 124,439,808 - 786,432 positions, biases and gains included.
    assert model.flops_per_token() == pytest.approx(6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024, rel=2e-3)


def test_names_are_the_published_ones_whatever_the_preset():
    names = set(make("gpt2").weights())
    block = {
        f"{part}.{kind}"
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    }
    assert names == {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"} | {
        f"transformer.h.{layer}.{name}" for layer in (0, 1) for name in block
    }
    assert set(make("modern").weights()) < names | {"lm_head.weight"}


@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("name", ["modern", "gpt2"])
def test_a_loss_in_pieces_has_the_loss_and_gradients_of_the_whole(name, cap, monkeypatch):
    """A piece's gradient lost, counted twice, or made without the cap's slope; ignored targets in the mean."""
    idx = tokens()
    targets = idx.roll(-1, 1)
    targets[1, 3:7] = -1
    results = []
    for pieces in (1 << 30, 17 * V):  # 48 rows: three pieces of 16
        monkeypatch.setitem(losses.PIECE_LOGITS, "cpu", pieces)
        model = make(name, softcap=cap)
        logits, loss = model(idx, targets)
        (3 * loss).backward()
        each = model(idx, targets, reduction="none")[1]
        results.append((loss, each, *(p.grad for p in model.parameters())))
    assert logits is None
    for whole, in_pieces in zip(*results, strict=True):
        torch.testing.assert_close(in_pieces, whole, rtol=1e-4, atol=1e-5)


def test_eight_bit_products_are_close_and_keep_names():
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 48)
    names = list(linear.state_dict())
    x, g = torch.randn(16, 32, requires_grad=True), torch.randn(16, 48)
    exact = linear(x)
    grads = torch.autograd.grad(exact, [x, linear.weight], g)
    assert use_fp8(torch.nn.Sequential(linear)) == 1
    assert list(linear.state_dict()) == names
    try:
        y = linear(x)
    except (RuntimeError, NotImplementedError):
        pytest.skip("no 8-bit products on this processor")
    for ours, reference in zip((y, *torch.autograd.grad(y, [x, linear.weight], g.bfloat16())), (exact, *grads), strict=True):
        assert (ours.float() - reference).norm() / reference.norm() < 0.08


@pytest.mark.parametrize("cap", [0.0, 15.0])
def test_a_head_in_eight_bits_is_the_plain_head_but_for_rounding(cap, monkeypatch):
    """Guards the scale of the gradient, which is assumed and not searched, and pieces that are put together wrongly."""
    monkeypatch.setitem(losses.PIECE_LOGITS, "cpu", 32 * 64)
    x = torch.randn(4, 20, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(64, 32, requires_grad=True)
    targets = torch.randint(64, (4, 20))
    targets[0, :3] = -1
    found = []
    for use_eight in (False, True):
        try:
            loss = losses.head_cross_entropy(x, weight, targets, "sum", cap, use_eight)
        except (RuntimeError, NotImplementedError):
            pytest.skip("no 8-bit products on this processor")
        found.append((loss, *torch.autograd.grad(loss, [x, weight])))
    for plain, eight in zip(*found, strict=True):
        assert (eight - plain).float().norm() / plain.float().norm() < 0.1


def test_a_padding_smaller_than_the_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"model\.padded_vocab_size=20"):
        build_model(ModelConfig(padded_vocab_size=20), 21)

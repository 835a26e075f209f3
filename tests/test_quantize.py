"""Fewer bits: what rounding may change, what GPTQ gains, what kernels compute, what a checkpoint keeps."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptcore.checkpoint import Snapshot, load_model, save_checkpoint
from gptcore.config import ExperimentConfig, ModelConfig, UserError, check_config, load_config, with_changes
from gptcore.generate import generate
from gptcore.journal import FILE_NAME
from gptcore.models import build_model, losses
from gptcore.models.head import LinearHead
from gptcore.models.quantized import KINDS, Int4Linear, Int8Linear, QuantizedLinear, layout_of
from gptcore.quantize import METHODS, Method, qat, quantize, quantize_checkpoint
from gptcore.quantize.__main__ import main
from gptcore.quantize.gptq import gptq_groups
from gptcore.quantize.model import origin_id, quantized_layer
from gptcore.quantize.qat import feel_int4
from gptcore.quantize.rounding import fake_quantize, group_scales, pack_pairs, quantize_groups, quantize_rows
from gptcore.shards import ShardSet, prepare
from gptcore.vocab.kinds import CharVocab

V, T = 29, 16
ROUNDING = [name for name in METHODS if METHODS[name].algorithm == "nearest"]


def make(preset="modern", family="gpt"):
    torch.manual_seed(0)
    model = build_model(ModelConfig(family=family, preset=preset, n_layer=2, n_head=2, n_embd=32, block_size=T), V)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def ids(batch=8, seed=1):
    return torch.randint(V, (batch, T), generator=torch.Generator().manual_seed(seed))


def test_int8_rounds_each_weight_by_at_most_half_a_step():
    weight = torch.randn(7, 13, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    q, scale = quantize_rows(weight)
    assert (q.dtype, scale.dtype) == (torch.int8, torch.bfloat16)
    assert ((q * scale.float()[:, None] - weight).abs() <= scale.float()[:, None] / 2 + 1e-7).all()


def test_int4_scales_beat_the_plain_range_and_digits_survive_packing():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    groups = weight.unflatten(1, (-1, 32))
    plain = (groups.abs().amax(-1) / 7).bfloat16()
    error = lambda scale: (fake_quantize(groups, scale) - groups).square().sum(-1)  # noqa: E731
    assert error(group_scales(groups)).sum() < 0.95 * error(plain).sum()
    q, scale = quantize_groups(weight, 32)
    layer = Int4Linear(64, 16)
    layer.weight, layer.scale = pack_pairs(q), scale
    assert torch.equal(layer.unpack(), q)
    assert torch.equal(layer.dequantize(), fake_quantize(groups, scale).flatten(1))
    assert torch.equal(layer.dequantize(torch.tensor([3, 1])), layer.dequantize()[[3, 1]])


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("out_features", [48, 29])
def test_every_kernel_multiplies_with_the_weights_it_stores(kind, rows, out_features):
    """Few rows take another kernel than many; a padded row or a scale of another group would show."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, out_features)
    layer = quantized_layer(linear.weight.detach(), linear.bias, kind, Method(kind), None)
    x = torch.randn(rows, 2, 64)
    wanted = torch.nn.functional.linear(x, layer.dequantize(), linear.bias)
    assert layer(x).shape == wanted.shape
    assert (layer(x) - wanted).norm() / wanted.norm() < (0.02 if kind == "int8_dynamic" else 0.01)
    assert (wanted - linear(x)).norm() / wanted.norm() < (0.2 if kind == "int4" else 0.05)


@pytest.mark.parametrize("in_features", [768, 48, 32, 13])
@pytest.mark.parametrize("rows", [1, 4])
def test_int8_for_few_tokens_is_the_exact_product_rounded_once(in_features, rows):
    """All 256 weights, which the int4 kernel reads in halves; 48 and 13 inputs it does not take, and 13 torch's int8 kernel does not."""
    layer = Int8Linear(in_features, 256)
    layer.weight = torch.arange(-128, 128).repeat(in_features, 1).T.contiguous().to(torch.int8)
    layer.weight[:, ::3] *= -1
    layer.scale = torch.rand(256, generator=torch.Generator().manual_seed(0)).bfloat16()
    behind = torch.full((rows * in_features + 64,), 1e30).bfloat16()  # what a kernel would read past the end
    x = behind[: rows * in_features].view(rows, in_features)
    x.copy_(torch.randn(rows, in_features, generator=torch.Generator().manual_seed(1)))
    wanted = x.double() @ layer.weight.double().T * layer.scale.double()
    rounded_weights = 0 if in_features % 16 == 0 else 0.01 * wanted.norm()  # unpacked ones are bfloat16
    assert (layer(x) - wanted).norm() < 1.1 * (wanted.bfloat16() - wanted).norm() + rounded_weights


def test_gptq_changes_outputs_less_than_rounding():
    """The point of it, on inputs that are correlated as activations are; with independent ones nothing could be made up for."""
    torch.manual_seed(0)
    weight = torch.randn(24, 64)
    x = torch.randn(500, 8) @ torch.randn(8, 64) + 0.1 * torch.randn(500, 64)
    fresh = torch.randn(500, 8) @ torch.linalg.lstsq(torch.randn(500, 8), x).solution + 0.1 * torch.randn(500, 64)

    def change(q, scale, inputs):
        rounded = ((q.float() - 8).unflatten(1, (-1, 32)) * scale.float()[..., None]).flatten(1)
        return (inputs @ (rounded - weight).T).norm()

    nearest, gptq = quantize_groups(weight, 32), gptq_groups(weight, x.T @ x, 32)
    assert change(*gptq, x) < 0.5 * change(*nearest, x)
    assert change(*gptq, fresh) < change(*nearest, fresh)


@pytest.mark.parametrize("preset", ["modern", "gpt2"])
@pytest.mark.parametrize("method", ["bf16", "int8", "int8-dynamic", "fp8", "int4", "int4-gptq"])
def test_a_quantized_model_keeps_the_contract_and_the_original(preset, method):
    model, idx = make(preset), ids()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = quantize(model, METHODS[method], ids(4, seed=2))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert small.count_parameters() == model.count_parameters()
    assert small.matmul_parameters() == model.matmul_parameters()
    each = small(idx, idx.roll(-1, 1), reduction="none")[1]
    full = model(idx, idx.roll(-1, 1), reduction="none")[1]
    assert 0 < (each - full).abs().mean() < (0.7 if "int4" in method else 0.15)
    cache = small.new_cache(8)
    parts = [small(piece, cache=cache)[0] for piece in idx.split([5, 1, 10], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1).float(), small(idx)[0].float(), atol=0.3, rtol=0.05)


def test_a_large_batch_in_pieces_goes_through_the_quantized_head(monkeypatch):
    """The pieces read the head's float weights where it has some: bytes of int8 would be taken for them."""
    small, idx = quantize(make(), METHODS["int8"]), ids()
    whole = small(idx, idx.roll(-1, 1), reduction="none")[1]
    monkeypatch.setitem(losses.PIECE_LOGITS, "cpu", 5 * V)
    logits, each = small(idx, idx.roll(-1, 1), reduction="none")
    assert logits is None
    torch.testing.assert_close(each, whole, atol=0.02, rtol=0.02)


@pytest.fixture
def checkpoint(tmp_path):
    model = make("gpt2")
    vocab = CharVocab([chr(97 + i) for i in range(V - 2)])
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocab.to_json()))
    config = ExperimentConfig(model=model.config)
    state = {"vocab_size": V, "vocab_fingerprint": vocab.fingerprint, "tokens_seen": 7}
    snapshot = Snapshot(3, model.weights(), {}, state, config, tmp_path / "tokenizer.json")
    return model, save_checkpoint(tmp_path / "run", snapshot)


@pytest.mark.parametrize("method", ROUNDING)
def test_a_quantized_checkpoint_loads_like_any_other(checkpoint, method, tmp_path):
    model, path = checkpoint
    made = quantize_checkpoint(path, METHODS[method], tmp_path / "small")
    loaded, read = load_model(made)
    expected = quantize(model, METHODS[method])
    assert torch.equal(loaded(ids())[0], expected(ids())[0])
    assert read.state["step"] == 3
    assert layout_of(loaded) == layout_of(expected) == read.state["quantization"]
    rng = torch.Generator().manual_seed(0)
    assert generate(loaded, ids(2)[:, :3], 2 * T, rng).shape == (2, 2 * T)
    file = load_file(made / "model.safetensors")
    assert "transformer.wte.weight" not in file or method == "bf16"  # tied: stored once, under the head's name
    if method != "bf16":
        assert (made / "model.safetensors").stat().st_size < 0.75 * (path / "model.safetensors").stat().st_size


def test_mistakes_are_said_before_anything_is_written(checkpoint, tmp_path):
    _, path = checkpoint
    with pytest.raises(UserError, match="--shards"):
        main([str(path), "--method", "int4-gptq", "--out", str(tmp_path / "small")])
    assert not (tmp_path / "small").exists()
    made = quantize_checkpoint(path, METHODS["int8"], tmp_path / "small")
    with pytest.raises(UserError, match="quantized already"):
        quantize_checkpoint(made, METHODS["int8"], tmp_path / "smaller")
    assert not (tmp_path / "smaller").exists()


def test_another_method_does_not_get_what_lies_there(checkpoint, tmp_path):
    """int4 into the folder of int8 was given the int8 copy; GPTQ's has the layout of int4 by rounding."""
    _, path = checkpoint
    out = tmp_path / "small"
    first = main([str(path), "--method", "int8", "--out", str(out)])
    journal = (out / FILE_NAME).read_bytes()
    for method in ("int4", "int8-dynamic"):
        with pytest.raises(UserError, match=r"--out: .*step_000003 is another checkpoint"):
            main([str(path), "--method", method, "--out", str(out)])
    assert (out / FILE_NAME).read_bytes() == journal
    again = main([str(path), "--method", "int8", "--out", str(out)])
    assert again["checkpoint"] == first["checkpoint"]
    with pytest.raises(UserError, match="another checkpoint"):  # the trained one itself
        quantize_checkpoint(path, METHODS["int4"], path.parent)
    assert origin_id(path, METHODS["int4"], None, None, 64, 100) != origin_id(path, METHODS["int4-gptq"], None, None, 64, 100)


def test_a_checkpoint_from_a_gpu_is_quantized_where_there_is_none(checkpoint, tmp_path, monkeypatch):
    """The way out that the refusal named could not be given to this command."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, path = checkpoint
    state = load_model(path)[1].state
    config = with_changes(load_config(path / "config.yaml"), train={"device": "cuda"})
    path = save_checkpoint(tmp_path / "gpu", Snapshot(4, model.weights(), {}, state, config, path / "tokenizer.json"))
    call = [str(path), "--out", str(tmp_path / "small")]
    with pytest.raises(UserError, match=r"train\.device=cuda: .*use train\.device=auto"):
        main(call)
    with pytest.raises(UserError, match=r"'model\.n_layer=2': .*only train\.field=value"):
        main([*call, "model.n_layer=2"])
    made = main([*call, "train.device=auto"])["checkpoint"]
    assert load_model(Path(made))[1].config == config, "how the weights were trained stays what it was"


def test_head_and_embedding_are_chosen_apart():
    small = quantize(make(), Method("int4", head="int8", embedding="bf16"))
    kinds = {name: module.kind for name, module in small.named_modules() if isinstance(module, QuantizedLinear)}
    assert kinds["lm_head"] == "int8"
    assert "transformer.wte" not in kinds
    assert kinds["transformer.h.1.mlp.c_fc"] == "int4"
    only = quantize(make(), Method("int4", only="transformer.h.1.")).named_modules()
    assert {n[:15] for n, m in only if isinstance(m, QuantizedLinear)} == {"transformer.h.1"}


def test_fine_tuning_multiplies_with_rounded_weights_and_moves_the_exact_ones():
    model, idx = make(), ids()
    assert feel_int4(model, 32) == 2 * 4 + 1
    loss = model(idx, idx.roll(-1, 1))[1]
    torch.testing.assert_close(
        loss, quantize(make(), Method("int4", embedding="bf16"))(idx, idx.roll(-1, 1))[1], atol=0.05, rtol=0.02
    )
    loss.backward()
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert weight.grad.abs().sum() > 0  # through the rounding, as if it were not there


def test_fine_tuning_rounds_the_head_of_a_large_batch_too(monkeypatch):
    """The loss in pieces reads the head's weights itself, and read the exact ones."""
    model, idx = make(), ids()
    assert feel_int4(model, 32)
    whole = model(idx, idx.roll(-1, 1))[1]
    (grad,) = torch.autograd.grad(whole, model.lm_head.weight)
    monkeypatch.setitem(losses.PIECE_LOGITS, "cpu", 32 * V)
    logits, loss = model(idx, idx.roll(-1, 1))
    assert logits is None
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(torch.autograd.grad(loss, model.lm_head.weight)[0], grad)


def test_fine_tuning_after_a_run_in_fp8_whose_beginning_is_gone(small_text, tmp_path, monkeypatch):
    """Fp8Linear is not what int4 rounds, a head in fp8 is not rounded either, and the weights come from the checkpoint."""
    tree = {
        "data": {"source": str(small_text)},
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": T},
        "train": {"precision": "fp8", "init_from": str(tmp_path / "gone"), "global_batch_size": 4, "device": "cpu"},
        "studies": {"accumulation": False},
    }
    config = check_config(tree)
    shards = ShardSet.open(prepare(config, tmp_path).shards)
    weights = build_model(config.model, shards.vocab_size).weights()
    felt, step = [], qat.train_step
    kinds = lambda model: [type(m) for m in model.modules() if isinstance(m, torch.nn.Linear)]  # noqa: E731
    monkeypatch.setattr(
        qat, "train_step", lambda trainer: (felt.append((kinds(trainer.model), trainer.model.lm_head.in_fp8)), step(trainer))
    )
    model = qat.fine_tune(weights, config, shards, 2, 32)
    assert felt == [([qat.FakeInt4Linear] * 4 + [qat.FakeInt4Head], False)] * 2
    assert kinds(model) == [torch.nn.Linear] * 4 + [LinearHead]
    assert not torch.equal(model.lm_head.weight, weights["lm_head.weight"])

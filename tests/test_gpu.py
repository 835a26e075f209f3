"""What only a GPU can show: precisions, compiling, the step as one CUDA graph. Skipped where there is none.

python -m pytest tests/test_gpu.py -v -s --durations=0      # about three minutes on one card, most of it compiling
"""

import math
import time

import pytest
import torch
from torch import Tensor

from gptcore import decoding
from gptcore.config import ModelConfig, UserError, check_config, with_changes
from gptcore.config.study import Cell
from gptcore.device import choose_device, naming_refusals
from gptcore.entry import StopFlag, recording
from gptcore.errors import NonFinite
from gptcore.generate import generate
from gptcore.journal import Journal
from gptcore.models import build_model
from gptcore.quantize import METHODS, quantize
from gptcore.shards import ShardSet, prepare
from gptcore.studies import Bench
from gptcore.studies.timing.options import TimingOptions
from gptcore.studies.timing.step import measure_step
from gptcore.train import build_trainer, preflight, resume, train_loop, train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


@pytest.fixture(scope="module")
def config(small_text):
    return check_config(
        {
            "data": {"source": str(small_text), "split": "tail", "val_fraction": 0.1},
            "model": {"n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": 64, "padded_vocab_size": 64},
            "train": {
                "device": "cuda",
                "precision": "fp32",
                "compile": "off",
                "cuda_graph": "off",
                "global_batch_size": 16,
                "max_steps": 40,
                "warmup_steps": 5,
                "eval_interval": 20,
                "save_interval": 20,
            },
        }
    )


@pytest.fixture(scope="module")
def shards(config, tmp_path_factory):
    return ShardSet.open(prepare(config, tmp_path_factory.mktemp("home")).shards)


def losses(config, shards, steps=40):
    trainer = build_trainer(config, shards)
    with trainer.device.attention(config.model.dropout):
        found = [train_step(trainer)[0] for _ in range(steps)]
    trainer.watch.check(trainer.step, config.train.lr)
    return torch.stack(found).tolist()


@pytest.fixture(scope="module")
def reference(config, shards):
    """fp32, uncompiled, kernel by kernel; close to the CPU's."""
    found = losses(config, shards)
    cpu = losses(with_changes(config, train={"device": "cpu"}), shards, 10)
    assert found[:10] == pytest.approx(cpu, abs=0.02)  # Muon's iteration is in bf16 here
    return found


@pytest.mark.parametrize(
    ("precision", "model", "tolerance"), [("tf32", {}, 0.03), ("bf16", {}, 0.05), ("fp16", {}, 0.05), ("fp8", {}, 0.15)]
)
def test_every_precision_learns_alike(config, shards, reference, precision, model, tolerance):
    found = losses(with_changes(config, model=model, train={"precision": precision}), shards)
    print(precision, found[-1], reference[-1])
    assert found[0] == pytest.approx(math.log(64), rel=0.05)
    assert found[-1] == pytest.approx(reference[-1], abs=tolerance)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("micro", [16, 4])
def test_a_graph_of_the_step_learns_the_same(config, shards, optimizer, micro):
    lr = 0.02 if optimizer == "muon" else 0.003
    base = with_changes(config, train={"optimizer": optimizer, "lr": lr, "micro_batch_size": micro, "ema_decay": 0.9})
    launched = losses(base, shards)
    graphed = losses(with_changes(base, train={"cuda_graph": "on"}), shards)
    assert graphed == pytest.approx(launched, abs=2e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_a_graph_with_dropout_learns_and_resumes(config, shards, reference, precision, tmp_path):
    changed = with_changes(config, model={"dropout": 0.1}, train={"precision": precision, "cuda_graph": "on", "ema_decay": 0.9})
    trainer = build_trainer(changed, shards)
    with recording(tmp_path, "toy") as journal, trainer.device.attention(0.1):
        start = time.perf_counter()
        estimate = preflight(trainer)
        print(f"{precision}: ready in {time.perf_counter() - start:.1f} s; {estimate.line('here')}")
        result = train_loop(trainer, journal, tmp_path, StopFlag(), resume(trainer, tmp_path))
    assert trainer.graph.steps == 3
    assert trainer.graph._graph is not None
    assert result["val_loss"] < 0.9 * result["untrained_loss"]
    again = build_trainer(changed, shards)
    resume(again, tmp_path)
    assert again.step == 40


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"compile": "off"}},
        {"train": {"compile": "on"}},
        {"train": {"compile": "on", "cuda_graph": "on"}},
        {"train": {"precision": "fp32"}},
        {"train": {"precision": "fp8"}},
        {"model": {"family": "mingru"}},
    ],
    ids=str,
)
def test_deterministic_mode_repeats_a_run_to_the_bit(config, shards, changes):
    """Also from another step on: a graph's first three steps are launched kernel by kernel."""
    base = with_changes(config, model={"dropout": 0.1}, train={"precision": "bf16", "deterministic": True})
    changed = with_changes(base, **changes)
    assert losses(changed, shards) == losses(changed, shards)


def test_what_has_no_deterministic_form_is_refused(config, shards):
    """The words are torch's own, and another version's may differ."""
    losses(with_changes(config, train={"deterministic": True}), shards, 1)
    ids, weights = torch.zeros(4, dtype=torch.int64, device="cuda"), torch.ones(4, device="cuda")
    with pytest.raises(UserError, match=r"train\.deterministic=true: .*bincount"), naming_refusals():
        torch.bincount(ids, weights)


def test_a_bad_step_in_a_graph_changes_nothing_and_is_named(config, shards):
    trainer = build_trainer(with_changes(config, train={"cuda_graph": "on"}), shards)
    for _ in range(8):
        train_step(trainer)
    trainer.watch.check(trainer.step, 0.02)
    for _ in range(2):
        train_step(trainer)
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = float("nan")
    before = {name: p.clone() for name, p in trainer.model.weights().items()}
    for _ in range(3):
        train_step(trainer)
    for name, p in trainer.model.weights().items():
        torch.testing.assert_close(p, before[name], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(NonFinite, match=r"at step 10 with"):
        trainer.watch.check(trainer.step, 0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_loss_in_pieces_is_the_loss_of_the_whole(config, shards, monkeypatch, precision, compile):
    from gptcore.models import losses as losses_module

    changed = with_changes(config, model={"softcap": 15}, train={"precision": precision, "compile": compile})
    torch._dynamo.reset()
    whole = losses(changed, shards, 10)
    monkeypatch.setitem(losses_module.PIECE_LOGITS, "cuda", 300 * 64)
    torch._dynamo.reset()
    assert losses(changed, shards, 10) == pytest.approx(whole, abs=1e-3 if precision == "fp32" else 0.03)


def test_out_of_memory_is_survived(config, shards):
    """A micro-batch that cannot fit: halved until it does, with the update of the whole batch."""
    trainer = build_trainer(with_changes(config, train={"max_steps": 100}), shards)
    free = torch.cuda.mem_get_info()[0]
    forward = trainer.forward

    def hungry(x, y, **kwargs):
        if len(x) > 4:
            torch.empty(2 * free, dtype=torch.uint8, device="cuda")
        return forward(x, y, **kwargs)

    trainer.forward = hungry
    train_step(trainer)
    assert trainer.micro_batch_size == 4
    assert preflight(trainer).free_mib > 0


@pytest.mark.parametrize(("heads", "width"), [(3, 32), (6, 128)])
def test_the_kernel_of_the_heads_is_norm_and_rotation(heads, width):
    from gptcore.models.kernels import rotate_heads
    from gptcore.models.layers import apply_rotary, rms_norm, rotary_table

    torch.manual_seed(0)
    qkv = torch.randn(2, 37, 3 * heads * width, device="cuda", dtype=torch.bfloat16)
    table = [part.cuda() for part in rotary_table(37, width)]
    ours, plain = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    q, k, v = plain.view(2, 37, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    expected = (apply_rotary(rms_norm(q), *table), apply_rotary(rms_norm(k), *table), v)
    found = rotate_heads(ours, *table, heads)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0.01, atol=0.01)
    weights = [torch.randn_like(one) for one in found]
    torch.autograd.backward(found, weights)
    torch.autograd.backward(expected, [weight.double() for weight in weights])
    torch.testing.assert_close(ours.grad.double(), plain.grad, rtol=0.02, atol=0.03)


@pytest.mark.parametrize("cap", [0.0, 15.0, 100.0])
def test_the_kernel_of_the_loss_is_loss_and_gradient(cap):
    from gptcore.models.fp8 import E5M2
    from gptcore.models.kernels import loss_and_gradient_fp8
    from gptcore.models.losses import loss_and_gradient

    torch.manual_seed(0)
    logits = (torch.randn(65, 5000, device="cuda") * 8).bfloat16()
    targets = torch.randint(0, 5000, (65,), device="cuda")
    targets[7] = -1
    nats, grad = loss_and_gradient_fp8(logits, targets, cap)
    expected, expected_grad = loss_and_gradient(logits.double(), targets, cap)
    assert nats.item() == pytest.approx(expected.item(), rel=1e-5)
    # two digits of a mantissa: an eighth of the number; below 2^-17 of the largest there is nothing
    wrong = (grad.float() / torch.finfo(E5M2).max - expected_grad).abs()
    assert (wrong <= expected_grad.abs() / 8 + 2**-31).all()
    logits[3, 4] = float("nan")
    assert loss_and_gradient_fp8(logits, targets, cap)[0].isnan()


def test_the_kernel_that_transposes_moves_every_byte():
    from gptcore.models.kernels import transpose_bytes

    torch.manual_seed(0)
    x = torch.randint(0, 256, (208, 337), device="cuda", dtype=torch.uint8)
    assert torch.equal(transpose_bytes(x), x.t())


def test_the_inside_of_a_graphed_step_is_mapped(config, shards, tmp_path):
    """The clock waits for the device at every boundary, which no recording survives: the graph must be there before."""
    cell = Cell("graph", "graph", {}, 1, with_changes(config, train={"cuda_graph": "on"}), TimingOptions(repeats=5))
    bench = Bench(shards, choose_device("cuda", "fp32"), tmp_path, Journal(tmp_path), None, tmp_path)
    row = measure_step(cell, bench).rows[0]
    assert row["step_ms"] > 0
    assert row["kernels"] > 0


def random_model(method):
    torch.manual_seed(0)
    model = build_model(ModelConfig(n_layer=2, n_head=2, n_embd=128, block_size=64), 96).cuda().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model if method is None else quantize(model, METHODS[method])


@pytest.mark.parametrize("method", [None, "bf16", "int8", "int8-dynamic", "int4", "fp8"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_token_as_one_graph_is_the_token_launched_kernel_by_kernel(method, batch):
    model = random_model(method)
    idx = torch.randint(96, (batch, 60), device="cuda")
    step = decoding.start_decoding(model, batch, 60, Tensor.float, torch.Generator("cuda"))
    cache = model.new_cache(batch)
    with torch.inference_mode():
        for piece in (idx[:, :5], *idx[:, 5:50].split(1, dim=1), idx[:, 50:54], *idx[:, 54:].split(1, dim=1)):
            expected = model(piece, cache=cache)[0][:, -1].float()
            tolerance = 1e-4 if method is None else 0.05 * expected.std().item()  # 16 bits: sums are taken in another order
            torch.testing.assert_close(step(piece), expected, rtol=0.0 if method else 1e-4, atol=tolerance)
    assert isinstance(step, decoding.GraphedDecoder)
    assert step._graph is not None


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_text_longer_than_the_context_goes_on_in_a_second_recording(temperature, monkeypatch):
    """And a recording draws the numbers that its generator would have given."""
    model, prompt = random_model(None), torch.zeros(2, 5, dtype=torch.int64, device="cuda")
    taken = []
    for least in (1, 10**9):
        monkeypatch.setattr(decoding, "LEAST_TOKENS", least)
        taken.append(generate(model, prompt, 150, torch.Generator("cuda").manual_seed(0), temperature=temperature))
    assert torch.equal(*taken)


@pytest.mark.parametrize("rows", [1, 5, 32])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_the_kernel_that_reads_narrow_weights_multiplies_with_them(rows, dtype):
    from gptcore.models.kernels import narrow_linear

    torch.manual_seed(0)
    x = torch.randn(rows, 776, device="cuda").bfloat16()
    weight = torch.randint(-128, 128, (1001, 776), device="cuda").to(dtype)
    scale = torch.rand(1001, device="cuda").bfloat16()
    expected = x.double() @ weight.double().T * scale.double()
    torch.testing.assert_close(narrow_linear(x, weight, scale).double(), expected, rtol=2**-7, atol=1e-2)

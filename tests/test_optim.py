"""Muon against singular values, AdamW grouping, schedules, and state that survives a save."""

from typing import get_args

import pytest
import torch

from gptcore.config import ModelConfig, TrainConfig
from gptcore.models import build_model
from gptcore.optim import WeightAverage, build_optimizers, lr_factor
from gptcore.optim.muon import Muon, orthogonalize

OPTIMIZERS = get_args(TrainConfig.model_fields["optimizer"].annotation)


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8), (3, 12, 12)])
def test_orthogonalized_singular_values_are_about_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(x))
    assert 0.5 < values.min() < values.max() < 1.3
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(orthogonalize(x).flatten(), (u @ vh).flatten(), dim=0) > 0.95


def test_stacked_matrices_move_as_each_alone():
    """Fused query-key-value rows must be made orthogonal one by one."""
    torch.manual_seed(0)
    parts = [torch.randn(4, 4, requires_grad=True) for _ in range(3)]
    fused = torch.cat([p.detach() for p in parts]).requires_grad_()
    grads = [torch.randn(4, 4) for _ in range(3)]
    for part, grad in zip(parts, grads, strict=True):
        part.grad = grad
    fused.grad = torch.cat(grads)
    Muon([{"params": parts}], lr=0.1).step()
    Muon([{"params": [fused], "splits": 3}], lr=0.1).step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in parts]))


@pytest.mark.parametrize(
    ("preset", "decayed", "plain"),
    [
        ("modern", 11 * 16, 11 * 16),  # head; table
        ("gpt2", 11 * 16, 8 * 16 + 9 * 16 + 3 * 2 * 16),  # tied head; positions, biases, norms
    ],
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_parameter_is_in_one_group_and_tables_do_not_decay(preset, decayed, plain, optimizer):
    model = build_model(ModelConfig(preset=preset, n_layer=1, n_head=2, n_embd=16, block_size=8), 11)
    optimizers = build_optimizers(model, TrainConfig(optimizer=optimizer))
    sizes = {g["weight_decay"]: sum(p.numel() for p in g["params"]) for g in optimizers.groups if "betas" in g}
    assert sizes == {0.1: decayed + (12 * 16 * 16 if optimizer != "muon" else 0), 0.0: plain}
    assert sum(p.numel() for g in optimizers.groups for p in g["params"]) == model.count_parameters()


def test_the_bigram_table_does_not_decay():
    optimizers = build_optimizers(build_model(ModelConfig(family="bigram"), 11), TrainConfig())
    assert [g["weight_decay"] for g in optimizers.groups] == [0.0]


def factor(schedule, step, steps=100, warmup=10, decay=0.5, floor=0.1):
    return lr_factor(schedule, step, step / steps, warmup, decay, floor)


def test_schedule_is_warmup_stable_decay():
    factors = [factor("wsd", s) for s in range(100)]
    assert factors[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert factors[10:51] == [1.0] * 41
    assert factors[99] == pytest.approx(0.1 + 0.9 / 50)
    assert factors[50:] == sorted(factors[50:], reverse=True)
    assert lr_factor("wsd", 0, 0.0, 0, 0.0, 0.0) == 1.0


def test_cosine_and_linear_reach_the_floor():
    assert factor("cosine", 50) == pytest.approx(0.1 + 0.9 / 2)
    assert factor("linear", 50) == pytest.approx(0.1 + 0.9 / 2)
    assert factor("cosine", 75) == pytest.approx(0.1 + 0.9 * 0.1464466)
    assert factor("linear", 75) == pytest.approx(0.1 + 0.9 / 4)
    for schedule in ("wsd", "cosine", "linear"):
        assert lr_factor(schedule, 10**6, 1.0, 10, 0.5, 0.1) == pytest.approx(0.1)  # the clock's end, at any step


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_moves_where_something_was_found(optimizer):
    """On a GPU a bad gradient is known to the device only: weights must stay as they were, decay included, and not become nan."""
    model = build_model(ModelConfig(preset="gpt2", n_layer=1, n_head=2, n_embd=16, block_size=8), 11)
    optimizers = build_optimizers(model, TrainConfig(optimizer=optimizer))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    before = [p.detach().clone() for p in model.parameters()]
    optimizers.step(torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    fresh = build_optimizers(model, TrainConfig(optimizer=optimizer))
    fresh.step(torch.zeros(()))
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_average_follows_the_weights_and_leaves_them_alone():
    model = build_model(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8), 11)
    average = WeightAverage(model, 0.75)
    start = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight += 1
    average.update()
    with average.applied() as weights:
        torch.testing.assert_close(model.lm_head.weight.detach(), start + 0.25)
        torch.testing.assert_close(weights["lm_head.weight"], start + 1)
    torch.testing.assert_close(model.lm_head.weight.detach(), start + 1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_restored_state_continues_identically(optimizer):
    def steps(model, optimizers, seeds):
        for seed in seeds:
            idx = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(seed))
            model(idx, idx.roll(-1, 1))[1].backward()
            optimizers.step()
            optimizers.zero_grad()

    def fresh():
        torch.manual_seed(0)
        model = build_model(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8), 11)
        return model, build_optimizers(model, TrainConfig(optimizer=optimizer))

    one, one_opt = fresh()
    steps(one, one_opt, range(6))
    two, two_opt = fresh()
    steps(two, two_opt, range(3))
    three, three_opt = fresh()
    three.load_state_dict(two.state_dict())
    three_opt.load_state_tensors({k: v.clone() for k, v in two_opt.state_tensors().items()})
    steps(three, three_opt, range(3, 6))
    for a, b in zip(one.parameters(), three.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_learning_rate_factor_reaches_every_group():
    model = build_model(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8), 11)
    optimizers = build_optimizers(model, TrainConfig(lr=0.02, adamw_lr=0.004))
    optimizers.set_lr_factor(0.5)
    assert {g["lr"] for g in optimizers.groups} == {0.01, 0.002}

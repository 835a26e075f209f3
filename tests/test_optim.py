"""Muon against singular values, AdamW grouping, schedules, and state that survives a save."""

import pytest
import torch

from gptcore.config import ModelConfig, TrainConfig
from gptcore.models import build_model
from gptcore.optim import build_optimizers, lr_factor
from gptcore.optim.muon import Muon, orthogonalize


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


def test_every_parameter_is_in_one_group_and_tables_do_not_decay():
    model = build_model(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8), 11)
    optimizers = build_optimizers(model, TrainConfig())
    sizes = {g["weight_decay"]: sum(p.numel() for p in g["params"]) for g in optimizers.groups if "betas" in g}
    assert sizes == {0.1: 11 * 16, 0.0: 11 * 16}  # head, table
    assert sum(p.numel() for g in optimizers.groups for p in g["params"]) == model.count_parameters()


def test_schedule_is_warmup_stable_decay():
    factors = [lr_factor(s, 100, 10, 0.5, 0.1) for s in range(100)]
    assert factors[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert factors[10:51] == [1.0] * 41
    assert factors[99] == pytest.approx(0.1 + 0.9 / 50)
    assert factors[50:] == sorted(factors[50:], reverse=True)
    assert lr_factor(0, 1, 0, 0.0, 0.0) == 1.0


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
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

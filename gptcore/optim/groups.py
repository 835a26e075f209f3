"""Which optimizer moves which parameter, and their state as named tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gptcore.config import TrainConfig
from gptcore.optim.muon import Muon


class Optimizers:
    """Several optimizers stepped as one. Learning rates are set as a share of each group's peak."""

    def __init__(self, optimizers: dict[str, torch.optim.Optimizer], names: dict[Tensor, str]) -> None:
        self._optimizers, self._names = optimizers, names
        self._peaks = {key: [group["lr"] for group in optimizer.param_groups] for key, optimizer in optimizers.items()}

    @property
    def groups(self) -> list[dict[str, object]]:
        return [group for optimizer in self._optimizers.values() for group in optimizer.param_groups]

    def set_lr_factor(self, factor: float) -> None:
        for key, optimizer in self._optimizers.items():
            for group, peak in zip(optimizer.param_groups, self._peaks[key], strict=True):
                group["lr"] = peak * factor

    def step(self) -> None:
        for optimizer in self._optimizers.values():
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """`{"muon/h.0.attn.c_attn.weight/momentum_buffer": tensor, …}`: flat, so safetensors can hold it."""
        return {
            f"{key}/{self._names[parameter]}/{slot}": value
            for key, optimizer in self._optimizers.items()
            for parameter, slots in optimizer.state.items()
            for slot, value in slots.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        by_name = {name: parameter for parameter, name in self._names.items()}
        for flat, value in tensors.items():
            key, name, slot = flat.split("/")
            parameter = by_name[name]
            # AdamW keeps its step counter where it was made; everything else lives with the parameter.
            target = value if value.dim() == 0 and not parameter.is_cuda else value.to(parameter.device)
            self._optimizers[key].state[parameter][slot] = target


def build_optimizers(model: nn.Module, config: TrainConfig) -> Optimizers:
    """Every parameter into exactly one group: Muon for matrices inside blocks, AdamW with decay for other matrices
    but look-up tables, AdamW without decay for the rest."""
    muon: dict[int, list[Tensor]] = {1: [], 3: []}
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if config.optimizer == "muon" and name.startswith("h.") and parameter.dim() == 2:
            muon[3 if name.endswith("c_attn.weight") else 1].append(parameter)
        elif parameter.dim() >= 2 and "wte" not in name:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    adamw_lr = config.lr if config.optimizer == "adamw" else config.adamw_lr
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if any(muon.values()):
        optimizers["muon"] = Muon(
            [{"params": params, "splits": splits} for splits, params in muon.items() if params],
            lr=config.lr,
            weight_decay=config.weight_decay,
        )
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizers["adamw"] = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=adamw_lr,
        betas=(config.beta1, config.beta2),
        fused=True,
    )
    grouped = [p for optimizer in optimizers.values() for group in optimizer.param_groups for p in group["params"]]
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    assert len(grouped) == len(set(grouped)) == len(names), "every parameter belongs to exactly one group"
    return Optimizers(optimizers, names)

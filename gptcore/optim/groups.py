"""Which optimizer moves which parameter, and their state as named tensors.

Where a model is spread over processes, the optimizers see plain tensors: this process's rows of every parameter. All that is
done to single numbers stays as it is, and only Muon has to know what a whole matrix is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gptcore.config import TrainConfig
from gptcore.optim.muon import Muon
from gptcore.ranks import ALONE, Ranks, fill, is_spread, local_part, spread_like


class Optimizers:
    """Several optimizers stepped as one. Learning rates are set as a share of each group's peak."""

    def __init__(
        self, optimizers: dict[str, torch.optim.Optimizer], names: dict[Tensor, str], whole: dict[str, Tensor]
    ) -> None:
        """names: of what the optimizers move. whole: the model's parameters by name; the same tensors unless it is spread."""
        self._optimizers, self._names, self._whole = optimizers, names, whole
        self._peaks = {key: [float(group["lr"]) for group in optimizer.param_groups] for key, optimizer in optimizers.items()}

    @property
    def groups(self) -> list[dict[str, object]]:
        return [group for optimizer in self._optimizers.values() for group in optimizer.param_groups]

    def set_lr_factor(self, factor: float) -> None:
        """Learning rates that live on the device are changed in place, where a CUDA graph reads them."""
        for key, optimizer in self._optimizers.items():
            # One factor for all: the optimizers' peaks differ by design, their schedule does not.
            for group, peak in zip(optimizer.param_groups, self._peaks[key], strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(peak * factor)
                else:
                    group["lr"] = peak * factor

    def collect(self) -> list[Tensor]:
        """What the optimizers move, each with its gradient: the model's parameters, or this process's rows of them."""
        for part, name in self._names.items():
            gradient = self._whole[name].grad
            if part is not self._whole[name]:
                part.grad = None if gradient is None else local_part(gradient)
        return list(self._names)

    def step(self, found_inf: Tensor | None = None) -> None:
        """Update every parameter, but none where `found_inf` (a float scalar on the device) is not 0."""
        for optimizer in self._optimizers.values():
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # the name torch's fused AdamW looks for
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self._optimizers.values():
            # None, not zeros: the next backward pass then writes where it would add.
            optimizer.zero_grad(set_to_none=True)
        for parameter in self._whole.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """`{"muon/h.0.attn.c_attn.weight/momentum_buffer": tensor, …}`: flat, so safetensors can hold it; spread as the parameters."""
        return {
            f"{key}/{self._names[parameter]}/{slot}": self._spread(self._names[parameter], value)
            for key, optimizer in self._optimizers.items()
            for parameter, slots in optimizer.state.items()
            for slot, value in slots.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """tensors: whole ones, as `state_tensors` names them."""
        by_name = {name: parameter for parameter, name in self._names.items()}
        for flat, value in tensors.items():
            # By name, not by number: so a state fits however the parameters are grouped or ordered.
            key, name, slot = flat.split("/")
            parameter = by_name[name]
            if value.dim() and is_spread(self._whole[name]):
                target = torch.empty_like(parameter)
                fill(self._spread(name, target), value)
            else:  # AdamW keeps its step counter where it was made; everything else lives with the parameter.
                target = value if value.dim() == 0 and not parameter.is_cuda else value.to(parameter.device)
            self._optimizers[key].state[parameter][slot] = target

    def _spread(self, name: str, value: Tensor) -> Tensor:
        parameter = self._whole[name]
        return spread_like(value, parameter) if value.dim() and is_spread(parameter) else value


def build_optimizers(model: nn.Module, config: TrainConfig, *, on_device: bool = False, ranks: Ranks = ALONE) -> Optimizers:
    """Every parameter into exactly one group: Muon for matrices inside blocks, AdamW with decay for the head, AdamW without
    decay for look-up tables, gains and biases. A tied table is the head, so it decays.

    on_device: learning rates and step counters are tensors beside the parameters, so that a CUDA graph can hold the step.
    ranks: the processes that share Muon's work.
    """
    # Muon is for matrices that map one hidden space to another, where a direction matters and an entry does not. Rows of tables
    # and head belong to single tokens, of which many get no gradient in a batch, and vectors have no singular values: these
    # keep AdamW (Jordan et al. 2024).
    muon: dict[int, list[Tensor]] = {1: [], 3: []}
    decayed, plain = [], []
    whole: dict[str, Tensor] = dict(model.named_parameters())
    parameters = {name: nn.Parameter(local_part(p)) if is_spread(p) else p for name, p in whole.items()}
    # By identity: a tied matrix is a table and a head, under whichever name it comes first.
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    heads = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    for name, parameter in parameters.items():
        is_table = id(whole[name]) in tables - heads
        if config.optimizer == "muon" and name.startswith("transformer.h.") and parameter.dim() == 2:
            muon[3 if name.endswith("c_attn.weight") else 1].append(parameter)
        # Decay pulls towards zero what the data does not hold in place. A matrix needs that: where a norm follows, its growth
        # only makes later steps smaller. A gain of zero would silence a channel, and the row of a rare token would decay in all
        # the steps that never see it.
        elif parameter.dim() >= 2 and not is_table:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    device = next(iter(parameters.values())).device

    def peak(lr: float) -> float | Tensor:
        return torch.tensor(lr, device=device) if on_device else lr

    optimizers: dict[str, torch.optim.Optimizer] = {}
    if any(muon.values()):
        muon_groups: list[dict[str, object]] = [
            {"params": params, "splits": splits, "lr": peak(config.lr)} for splits, params in muon.items() if params
        ]
        # Newton–Schulz forgives the rounding of bfloat16, whose products a GPU makes several times faster; on a CPU float32
        # keeps runs the same to the bit.
        is_short = device.type == "cuda" or config.precision == "bf16"
        dtype = torch.bfloat16 if is_short else torch.float32
        rows = {parameters[name]: len(p) for name, p in whole.items() if is_spread(p)} or None
        optimizers["muon"] = Muon(
            muon_groups, lr=config.lr, weight_decay=config.weight_decay, dtype=dtype, ranks=ranks, rows=rows
        )
    rest_lr = config.adamw_lr if config.optimizer == "muon" else config.lr
    rest = [
        {"params": params, "weight_decay": decay, "lr": peak(rest_lr)}
        for params, decay in ((decayed, config.weight_decay), (plain, 0.0))
        if params
    ]
    # fused: one kernel for all parameters instead of several for each. capturable: its step counter is on the device, where a
    # CUDA graph can count.
    optimizers["adamw"] = torch.optim.AdamW(
        rest, lr=rest_lr, betas=(config.beta1, config.beta2), fused=True, capturable=on_device
    )
    grouped = [p for optimizer in optimizers.values() for group in optimizer.param_groups for p in group["params"]]
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    assert len(grouped) == len(set(grouped)) == len(names), "every parameter belongs to exactly one group"
    return Optimizers(optimizers, names, whole)

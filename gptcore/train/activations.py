"""What autograd keeps of a forward pass for the backward pass, counted in bytes on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gptcore.ranks import local_part


class Saved:
    """Bytes of the storages kept: now, and at most in one forward pass."""

    def __init__(self) -> None:
        self.kept: dict[int, int] = {}  # by address: several tensors may share a storage
        self.peak = 0

    @property
    def peak_mib(self) -> float:
        return self.peak / 2**20


@contextmanager
def saved_activations(model: nn.Module) -> Iterator[Saved]:
    """Count while the block lasts. Parameters are not counted; each call of the model begins anew, for the last one's graph is gone."""
    own = {local_part(p).untyped_storage().data_ptr() for p in model.parameters()}
    saved = Saved()

    def pack(tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return tensor  # also one that was gathered for this pass
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved.kept[storage.data_ptr()] = storage.nbytes()
            saved.peak = max(saved.peak, sum(saved.kept.values()))
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with model.register_forward_pre_hook(lambda *_: saved.kept.clear()), hooks:
        yield saved

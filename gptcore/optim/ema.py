"""A moving average of the weights: what training jitters around, without waiting for the learning rate to fall."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gptcore.ranks import is_spread, local_part, spread_like


class WeightAverage:
    """`average = decay * average + (1 - decay) * weights` after every step (Polyak & Juditsky 1992)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self._model = decay, model
        self._parameters = {name: local_part(p) for name, p in model.named_parameters()}  # of a spread model: its part here
        # Starts as the weights, not as zeros: then there is no bias towards zero to be corrected.
        self.average = {name: p.detach().clone() for name, p in self._parameters.items()}

    # Steps of a constant size circle around a minimum; their mean lies nearer to it than any of them. Much of what the fall of
    # the learning rate brings, at any time, and without stopping the run for it.
    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(list(self.average.values()), list(self._parameters.values()), 1 - self.decay)

    def weights(self) -> dict[str, Tensor]:
        """The average as the model's `weights()` are: spread where they are."""
        parameters = dict(self._model.named_parameters())
        return {
            name: spread_like(tensor, parameters[name]) if is_spread(parameters[name]) else tensor
            for name, tensor in self.average.items()
        }

    @contextmanager
    def applied(self) -> Iterator[dict[str, Tensor]]:
        """Inside, the model holds the average; yields copies of the weights it goes on with."""
        weights = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._set(self.average)
        try:
            yield weights
        finally:
            self._set(weights)

    @torch.no_grad()
    def _set(self, tensors: dict[str, Tensor]) -> None:
        torch._foreach_copy_(list(self._parameters.values()), [tensors[name] for name in self._parameters])

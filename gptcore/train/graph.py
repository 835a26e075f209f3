"""The whole step as one CUDA graph: for small models, launching hundreds of kernels takes longer than running them.

The first steps run as usual, on the stream that captures later, so that compiling, optimizer state and workspaces are there;
then one step is recorded, and from then on a step is one launch. Batches are copied to where the graph reads them; learning
rates are tensors that it reads; dropout draws on from the device's generator.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

WARMUP_STEPS = 3
Losses = tuple[Tensor, Tensor]


class GraphedStep:
    """Three steps of warm-up, then a recording of `step(x, y)`, then replays."""

    def __init__(self, device: torch.device) -> None:
        self.steps = 0  # of warm-up
        self._stream = torch.cuda.current_stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, step: Callable[[Tensor, Tensor], Losses], x: Tensor, y: Tensor) -> Losses:
        """`step` on this batch: as usual, or as a replay; before the first one it is recorded."""
        if self._graph is None and self.steps < WARMUP_STEPS:
            return self._warm_up(step, x, y)
        if self._graph is None:
            self._record(step, x, y)
        self._x.copy_(x, non_blocking=True)
        self._y.copy_(y, non_blocking=True)
        assert self._graph is not None
        self._graph.replay()
        loss, norm = self._losses
        return loss.clone(), norm.clone()  # the next replay writes into the same place

    def _warm_up(self, step: Callable[[Tensor, Tensor], Losses], x: Tensor, y: Tensor) -> Losses:
        """A step as usual, on the stream of the capture."""
        self.steps += 1
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            losses = step(x, y)
        torch.cuda.current_stream().wait_stream(self._stream)
        return losses

    def _record(self, step: Callable[[Tensor, Tensor], Losses], x: Tensor, y: Tensor) -> None:
        self._x, self._y = x.clone(), y.clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._losses = step(self._x, self._y)
        self._graph = graph
        log.info("from step %d on, a step is one CUDA graph", self.steps)

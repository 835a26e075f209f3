"""Reading a text into a model bit by bit: over its cache, and on a GPU, one token at a time, as one CUDA graph.

    read = start_reading(model, batch=1, tokens=200)
    logits = read(prompt)                                # (B, V): what comes after ids (B, T)
    logits = read(next_id)                               # (B, V): after one more, (B, 1)

A token of a small model is hundreds of kernels that take longer to launch than to run; recorded once, they are one launch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gptcore.models import LanguageModel
from gptcore.models.cache import FixedCache
from gptcore.models.gpt import GPT

LEAST_TOKENS = 16  # a recording takes as long as a few tokens launched kernel by kernel


def start_reading(model: LanguageModel, batch: int, tokens: int) -> Callable[[Tensor], Tensor]:
    """A function from ids (B, T) to the logits of what follows them and all that it was given before, (B, V).

    tokens: how many it will be given at most; for a model with positions no more than its `block_size`.
    """
    if isinstance(model, GPT) and tokens >= LEAST_TOKENS:
        device = next(iter(model.weights().values())).device
        if device.type == "cuda":
            return GraphedReader(model, FixedCache(model.block_size, tokens, device))
    cache = model.new_cache(batch)

    def read(idx: Tensor) -> Tensor:
        return _last_logits(model, idx, cache)

    return read


class GraphedReader:
    """Several tokens at once as usual; single ones too at first, which warms up, then as a recording."""

    def __init__(self, model: GPT, cache: FixedCache) -> None:
        self.model, self.cache = model, cache
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_warm = False

    @property
    def is_recorded(self) -> bool:
        return self._graph is not None

    def __call__(self, idx: Tensor) -> Tensor:
        if idx.size(1) > 1 or not self._is_warm:
            self._is_warm |= idx.size(1) == 1
            return _last_logits(self.model, idx, self.cache)
        if self._graph is None:
            self._record(idx)
        assert self._graph is not None
        self._idx.copy_(idx)
        self._graph.replay()
        self.cache.length += 1  # a recording advances only what is on the device
        return self._logits.clone()  # the next replay writes into the same place

    def _record(self, idx: Tensor) -> None:
        self._idx, length = idx.clone(), self.cache.length
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads of a server may go on allocating meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._logits = _last_logits(self.model, self._idx, self.cache)
        self._graph, self.cache.length = graph, length  # nothing was read yet


def _last_logits(model: LanguageModel, idx: Tensor, cache: object) -> Tensor:
    logits = model(idx, cache=cache)[0]
    return logits[:, -1]

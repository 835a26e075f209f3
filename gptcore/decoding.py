"""Writing on, token by token: over the model's cache, and on a GPU each token, drawing included, as one CUDA graph.

    step = start_decoding(model, batch=1, tokens=200, pick=pick, rng=rng)
    ids = step(prompt)                                   # (B, 1): what `pick` takes from the logits after ids (B, T)
    ids = step(ids)                                      # (B, 1): from those after one more

A token of a small model is hundreds of kernels that take longer to launch than to run; recorded once, they are one launch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from gptcore.models import LanguageModel
from gptcore.models.cache import FixedCache
from gptcore.models.gpt import GPT

LEAST_TOKENS = 16  # a recording takes as long as a few tokens launched kernel by kernel

Pick = Callable[[Tensor], Tensor]  # from logits (B, V)

RECORDING = threading.Lock()  # all recordings of a process go by one stream


def start_decoding(model: LanguageModel, batch: int, tokens: int, pick: Pick, rng: torch.Generator) -> Pick:
    """A function from ids (B, T) to what `pick`, which draws from `rng`, takes from the logits of what follows them and all ids before.

    tokens: how many it will be given at most; for a model with positions no more than its `block_size`.
    """
    if isinstance(model, GPT) and tokens >= LEAST_TOKENS:
        device = next(iter(model.weights().values())).device
        if device.type == "cuda":
            return GraphedDecoder(model, FixedCache(model.block_size, tokens, device), pick, rng)
    cache = model.new_cache(batch)

    def step(idx: Tensor) -> Tensor:
        return _step(model, idx, cache, pick)

    return step


class GraphedDecoder:
    """Several tokens at once as usual; single ones too at first, which warms up, then as a recording."""

    def __init__(self, model: GPT, cache: FixedCache, pick: Pick, rng: torch.Generator) -> None:
        self.model, self.cache, self.pick, self.rng = model, cache, pick, rng
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_warm = False

    @property
    def is_recorded(self) -> bool:
        return self._graph is not None

    def __call__(self, idx: Tensor) -> Tensor:
        if idx.size(1) > 1 or not self._is_warm:
            self._is_warm |= idx.size(1) == 1
            return _step(self.model, idx, self.cache, self.pick)
        if self._graph is None:
            self._record(idx)
        assert self._graph is not None
        self._idx.copy_(idx)
        self._graph.replay()
        self.cache.length += 1  # a recording advances only what is on the device
        return self._picked.clone()  # the next replay writes into the same place

    def _record(self, idx: Tensor) -> None:
        self._idx, length = idx.clone(), self.cache.length
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.rng)  # each replay draws the next numbers
        # Other threads of a server may go on with their work meanwhile.
        with RECORDING, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._picked = _step(self.model, self._idx, self.cache, self.pick)
        self._graph, self.cache.length = graph, length  # nothing was read yet


def _step(model: LanguageModel, idx: Tensor, cache: object, pick: Pick) -> Tensor:
    logits = model(idx, cache=cache)[0]  # (B, T, V)
    assert logits is not None
    return pick(logits[:, -1])

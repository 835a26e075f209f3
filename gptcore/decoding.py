"""Writing on, token by token, over the model's cache: on a GPU a token is one CUDA graph, drawing included, on a CPU one plain loop.

A token of a small model is hundreds of operations that take longer to start than to run. A GPU can record them and start all at once.
On a CPU it is Python that takes the time, in calls of modules and the search for their attributes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.models import LanguageModel
from gptcore.models.cache import FixedCache, KVCache
from gptcore.models.gpt import GPT, Block
from gptcore.models.head import LinearHead
from gptcore.models.layers import ACTIVATIONS, Norm, apply_rotary, rms_norm
from gptcore.models.losses import soft_cap
from gptcore.models.quantized import QuantizedLinear

LEAST_TOKENS = 16  # a recording takes as long as a few tokens launched kernel by kernel

Pick = Callable[[Tensor], Tensor]  # from logits (B, V), such as to the ids drawn, (B, 1)
Step = Callable[[Tensor], Tensor]  # from ids (B, T) to what is picked from the logits of what follows

RECORDING = threading.Lock()  # all recordings of a process go by one stream


def start_decoding(model: LanguageModel, batch: int, tokens: int, pick: Pick, rng: torch.Generator) -> Step:
    """A function from ids (B, T) to what `pick`, which draws from `rng`, takes from the logits of what follows them and all ids before.

    tokens: how many it will be given at most; for a model with positions no more than its `block_size`.
    """
    if isinstance(model, GPT):
        device = next(iter(model.weights().values())).device
        if device.type == "cuda" and tokens >= LEAST_TOKENS:
            return GraphedDecoder(model, FixedCache(model.block_size, tokens, device), pick, rng)
        if device.type == "cpu" and _is_plain(model):
            return FlatDecoder(model, batch, model.new_cache(batch), pick)
    return partial(_step, model, cache=model.new_cache(batch), pick=pick)


class GraphedDecoder:
    """Several tokens at once as usual; single ones too at first, which warms up, then as a recording."""

    def __init__(self, model: GPT, cache: FixedCache, pick: Pick, rng: torch.Generator) -> None:
        self.model, self.cache, self.pick, self.rng = model, cache, pick, rng
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_warm = False

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


class FlatDecoder:
    """Several tokens at once as usual, single ones through `GPT.forward` written as one loop: the same operations, so the same bits, but
    modules, their attributes and hooks are looked up once for all tokens.
    """

    def __init__(self, model: GPT, batch: int, cache: KVCache, pick: Pick) -> None:
        self.model, self.cache, self.pick = model, cache, pick
        blocks = cast(Iterable[Block], model.transformer.h)
        parts = [(b.ln_1, b.attn.c_attn, b.attn.c_proj, b.ln_2, b.mlp.c_fc, b.mlp.c_proj) for b in blocks]
        self._blocks = [tuple(_function(part, batch) for part in block) for block in parts]
        norm = model.transformer.ln_f
        self._last_norm = None if norm is None else _function(norm, batch)
        self._head = _function(model.lm_head, batch)

    def __call__(self, idx: Tensor) -> Tensor:
        if idx.size(1) > 1:
            return _step(self.model, idx, self.cache, self.pick)
        transformer, config, cache, at = self.model.transformer, self.model.config, self.cache, self.cache.length
        B, C, nh = len(idx), config.n_embd, config.n_head
        is_post, qk_norm, is_rotary = config.norm_position == "post", config.qk_norm, config.positions == "rotary"
        activation = ACTIVATIONS[config.activation]
        position = None if transformer.wpe is None else transformer.wpe.weight[at : at + 1]  # (1, C)
        x = transformer.embed(idx, position)[:, 0]  # (B, C)
        if is_rotary:
            cos, sin = transformer.cos[at : at + 1], transformer.sin[at : at + 1]  # (1, hs / 2) each
        dtype, is_narrow = x.dtype, x.itemsize == 2
        for layer, (norm_1, c_attn, c_attn_proj, norm_2, c_fc, c_mlp_proj) in enumerate(self._blocks):
            qkv = c_attn(x if is_post else norm_1(x))  # (B, 3C)
            if is_narrow:
                qkv = qkv.float()  # as in CausalSelfAttention
            q, k, v = qkv.view(B, 3, nh, 1, C // nh).unbind(1)  # (B, nh, 1, hs) each
            if qk_norm:
                q, k = rms_norm(q), rms_norm(k)
            if is_rotary:
                q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
            y = F.scaled_dot_product_attention(q, *cache.extend(layer, k, v)).reshape(B, C)
            if is_narrow:
                y = y.to(dtype)
            x = c_attn_proj(y).add_(x)  # (B, C)
            if is_post:
                x = norm_1(x)
                x = norm_2(c_mlp_proj(activation(c_fc(x))).add_(x))
            else:
                x = c_mlp_proj(activation(c_fc(norm_2(x)))).add_(x)  # (B, C)
        cache.advance(1)
        if self._last_norm is not None:
            x = self._last_norm(x)
        return self.pick(soft_cap(self._head(x), config.softcap))  # from (B, V)


def _function(module: nn.Module, rows: int) -> Callable[[Tensor], Tensor]:
    """What a norm or a linear layer computes of so many rows, without what a module does around it. A linear layer's answer is its own."""
    if isinstance(module, QuantizedLinear):
        return module.product(rows, torch.device("cpu"))
    if isinstance(module, nn.Linear) and type(module) in (nn.Linear, LinearHead):
        return partial(F.linear, weight=module.weight, bias=module.bias)
    if isinstance(module, Norm):
        shape, weight = (module.channels,), module.weight
        if module.kind == "rms":
            return partial(F.rms_norm, normalized_shape=shape, weight=weight)
        return partial(F.layer_norm, normalized_shape=shape, weight=weight, bias=module.bias)
    return module.forward


def _is_plain(model: GPT) -> bool:
    """Whether a module's call is its forward pass and nothing else."""
    is_watched = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return not (is_watched or model.training or torch.is_autocast_enabled("cpu"))


def _step(model: LanguageModel, idx: Tensor, cache: object, pick: Pick) -> Tensor:
    logits = model(idx, cache=cache)[0]  # (B, T, V)
    assert logits is not None
    return pick(logits[:, -1])

"""The decoder-only Transformer, to be read top to bottom: attention, feed-forward, block, GPT.

The block is today's: RMS norm before each part, rotary positions, normalised queries and keys, squared ReLU, no biases,
output projections that start at zero so that every block starts as the identity. Names of parameters are GPT-2's.
Sources: Vaswani et al. 2017 (attention), Radford et al. 2019 (GPT-2's layout), Su et al. 2021 (rotary positions), Henry et
al. 2020 (query-key normalisation), So et al. 2021 (squared ReLU), Zhang et al. 2019 (zero initialisation).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.config import ModelConfig
from gptcore.models.base import LanguageModel, cross_entropy, without_src
from gptcore.models.layers import apply_rotary, rms_norm, rotary_table


class KVCache:
    """Keys and values of the tokens seen so far, one pair of (B, nh, block_size, hs) a layer."""

    def __init__(self, n_layer: int, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.keys = [like.new_zeros(shape) for _ in range(n_layer)]
        self.values = [like.new_zeros(shape) for _ in range(n_layer)]
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, nh, T, hs) and return all so far, (B, nh, length + T, hs)."""
        end = self.length + k.size(2)
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class CausalSelfAttention(nn.Module):
    """Each position looks at itself and what came before."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # queries, keys and values in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None, layer: int) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
            for part in self.c_attn(x).split(C, dim=2)
        )
        # Normalised queries and keys keep the attention logits small, so a large learning rate cannot saturate them.
        q, k = apply_rotary(rms_norm(q), *rotary), apply_rotary(rms_norm(k), *rotary)  # (B, nh, T, hs)
        mask = None
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, nh, S, hs)
            if 1 < T < k.size(2):
                mask = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T)  # (T, S)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, dropout_p=self.dropout if self.training else 0.0
        )  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)  # (B, T, C)


class MLP(nn.Module):
    """The same two matrices at every position, with a squared ReLU between."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c_fc(x)).square()  # (B, T, 4C)
        return F.dropout(self.c_proj(x), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    """Two residual steps: mix over positions, then over channels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None, layer: int) -> Tensor:
        x = x + self.attn(rms_norm(x), rotary, cache, layer)  # (B, T, C)
        return x + self.mlp(rms_norm(x))  # (B, T, C)


class GPT(LanguageModel):
    """Token ids (B, T) to logits (B, T, V)."""

    has_positions = True
    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.block_size, self.vocab_size = config, config.block_size, vocab_size
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, vocab_size, bias=False)
        cos, sin = rotary_table(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.wte.weight)
        nn.init.normal_(self.lm_head.weight, std=0.001)  # near-uniform first guess: the untrained loss is ln V
        for name, weight in self.h.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.zeros_(weight)
            else:
                bound = (3 / weight.size(1)) ** 0.5  # uniform with variance 1 / fan-in
                nn.init.uniform_(weight, -bound, bound)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        src: Tensor | None = None,
        cache: KVCache | None = None,
        reduction: str = "mean",
    ) -> tuple[Tensor | None, Tensor | None]:
        without_src(src)
        T = idx.size(1)
        start = cache.length if cache is not None else 0
        assert start + T <= self.block_size, f"{start + T} tokens do not fit block_size={self.block_size}"
        rotary = self.cos[start : start + T], self.sin[start : start + T]  # (T, hs / 2) each
        x = rms_norm(self.wte(idx))  # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, rotary, cache, layer)  # (B, T, C)
        if cache is not None:
            cache.length += T
        logits = self.lm_head(rms_norm(x))  # (B, T, V)
        return logits, None if targets is None else cross_entropy(logits, targets, reduction)

    def new_cache(self, batch_size: int) -> KVCache:
        c = self.config
        return KVCache(c.n_layer, (batch_size, c.n_head, c.block_size, c.n_embd // c.n_head), like=self.cos)

    def matmul_parameters(self) -> int:
        return self.count_parameters() - self.wte.weight.numel()

    def flops_per_token(self) -> float:
        """6N + 12·n_layer·n_embd·T (PaLM, Chowdhery et al. 2022, appendix B)."""
        return 6.0 * self.matmul_parameters() + 12.0 * self.config.n_layer * self.config.n_embd * self.block_size

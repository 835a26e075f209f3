"""The decoder-only Transformer, to be read top to bottom: attention, feed-forward, block, stack, head.

Every `config.` below is one difference between the paper of 2017, GPT-2 and today; `model.preset` chooses them together.
Parameters have GPT-2's published names, whatever the preset. Sources: Vaswani et al. 2017 (attention, post-norm), Radford et
al. 2019 (GPT-2: pre-norm, tied head), Su et al. 2021 (rotary positions), Henry et al. 2020 (query-key normalisation), So et
al. 2021 (squared ReLU), Zhang et al. 2019 (zero initialisation).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.config import ModelConfig
from gptcore.models.base import LanguageModel, without_src
from gptcore.models.cache import KVCache
from gptcore.models.layers import (
    ACTIVATIONS,
    Norm,
    apply_rotary,
    attend_once,
    compute_dtype,
    dropout,
    has_kernels,
    rms_norm,
    rotary_table,
)
from gptcore.models.losses import PIECE_LOGITS, cross_entropy, head_cross_entropy, piecewise_cross_entropy, soft_cap

Rotary = tuple[Tensor, Tensor] | None


class CausalSelfAttention(nn.Module):
    """Each position looks at itself and what came before."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.dropout, self.qk_norm = config.n_head, config.dropout, config.qk_norm
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, config.bias)  # queries, keys, values in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, config.bias)

    def forward(self, x: Tensor, rotary: Rotary, cache: KVCache | None, layer: int) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x)  # (B, T, 3C)
        if not x.is_cuda and qkv.itemsize == 2:
            qkv = qkv.float()  # on a CPU attention in 16 bits takes three times as long, forwards and backwards
        if rotary is not None and self.qk_norm and has_kernels(qkv, C // self.n_head):
            from gptcore.models.kernels import rotate_heads

            q, k, v = rotate_heads(qkv, *rotary, self.n_head)  # what follows here, in one kernel
        else:
            q, k, v = qkv.view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4).unbind(0)  # (B, nh, T, hs) each
            if self.qk_norm:  # keeps the attention logits small, so a large learning rate cannot saturate them
                q, k = rms_norm(q), rms_norm(k)  # (B, nh, T, hs)
            if rotary is not None:
                q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)  # (B, nh, T, hs)
        mask = None
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, nh, S, hs)
            mask = cache.mask(T, k.size(2))  # (T, S)
        is_cast_back = not x.is_cuda and torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=False) if is_cast_back else nullcontext():
            if cache is not None and T == 1 and q.is_cuda and q.itemsize == 4:
                y = attend_once(q, k, v, mask)  # (B, nh, 1, hs)
            else:
                y = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, dropout_p=self.dropout if self.training else 0.0
                )  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C).to(x.dtype)  # (B, T, C)
        return dropout(self.c_proj(y), self.dropout, self.training)  # (B, T, C)


class MLP(nn.Module):
    """The same two matrices at every position, with a nonlinearity between."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout, self.activation = config.dropout, ACTIVATIONS[config.activation]
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.c_fc(x))  # (B, T, 4C)
        return dropout(self.c_proj(x), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    """Two residual steps: mix over positions, then over channels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.is_post_norm = config.norm_position == "post"
        self.ln_1 = Norm(config.n_embd, config.norm, config.norm_gain, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = Norm(config.n_embd, config.norm, config.norm_gain, config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: Rotary, cache: KVCache | None, layer: int) -> Tensor:
        if self.is_post_norm:  # 2017: add, then normalise the sum
            x = self.ln_1(x + self.attn(x, rotary, cache, layer))  # (B, T, C)
            return self.ln_2(x + self.mlp(x))  # (B, T, C)
        x = x + self.attn(self.ln_1(x), rotary, cache, layer)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class Transformer(nn.Module):
    """Embeddings, blocks, last norm: ids (B, T) to what the head reads, (B, T, C)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, C = config, config.n_embd
        self.wte = nn.Embedding(vocab_size, C)
        self.wpe = nn.Embedding(config.block_size, C) if config.positions == "learned" else None
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        # After post-norm blocks the stream is normalised already.
        self.ln_f = Norm(C, config.norm, config.norm_gain, config.bias) if config.norm_position == "pre" else None
        if config.positions == "rotary":
            cos, sin = rotary_table(config.block_size, C // config.n_head)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def embed(self, idx: Tensor, positions: Tensor | None) -> Tensor:
        """What the first block reads, (B, T, C), of ids (B, T) and, where they are learned, the vectors of their positions, (T, C)."""
        x = self.wte(idx)  # (B, T, C)
        if positions is not None:
            x = x + positions  # (B, T, C)
        if self.config.embedding_norm:
            x = rms_norm(x)  # (B, T, C)
        # The residual stream is kept in the type of the products: half the memory traffic of float32 at 16 bits.
        return dropout(x.to(compute_dtype(x)), self.config.dropout, self.training)  # (B, T, C)

    def forward(self, idx: Tensor, cache: KVCache | None) -> Tensor:
        T = idx.size(1)
        places = slice(0, T) if cache is None else cache.places(T)
        x = self.embed(idx, None if self.wpe is None else self.wpe.weight[places])  # (B, T, C)
        rotary = None
        if self.config.positions == "rotary":
            rotary = self.cos[places], self.sin[places]  # (T, hs / 2) each
        for layer, block in enumerate(self.h):
            x = block(x, rotary, cache, layer)  # (B, T, C)
        if cache is not None:
            cache.advance(T)
        return x if self.ln_f is None else self.ln_f(x)  # (B, T, C)


class GPT(LanguageModel):
    """Token ids (B, T) to logits (B, T, V)."""

    has_positions = True
    head_in_fp8 = False

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.block_size, self.vocab_size = config, config.block_size, vocab_size
        self.transformer = Transformer(config, vocab_size)
        self.lm_head = nn.Linear(config.n_embd, vocab_size, bias=False)
        if config.tie:
            self.lm_head.weight = self.transformer.wte.weight
        initialise(self, config)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        src: Tensor | None = None,
        cache: KVCache | None = None,
        reduction: str = "mean",
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits (B, T, V), or the loss; the logits of a large batch are never whole in memory, so then they are None."""
        without_src(src)
        end = idx.size(1) + (cache.length if cache is not None else 0)
        assert end <= self.block_size, f"{end} tokens do not fit block_size={self.block_size}"
        return self.read_out(self.transformer(idx, cache), targets, reduction)

    def read_out(self, x: Tensor, targets: Tensor | None, reduction: str) -> tuple[Tensor | None, Tensor | None]:
        """The last hidden states x (B, T, C) to what `forward` returns."""
        cap = self.config.softcap
        if targets is not None and (targets.numel() * self.vocab_size > PIECE_LOGITS[x.device.type] or self.head_in_fp8):
            fp8 = self.head_in_fp8 and self.training
            if not isinstance(self.lm_head, nn.Linear):  # quantized
                return None, piecewise_cross_entropy(x, self.lm_head, targets, reduction, cap, self.vocab_size)
            # Fine-tuning for int4 learns on rounded weights (gptcore.quantize.qat).
            weight = getattr(self.lm_head, "rounded_weight", self.lm_head.weight)
            return None, head_cross_entropy(x, weight, targets, reduction, cap, fp8)
        logits = soft_cap(self.lm_head(x), cap)  # (B, T, V)
        return logits, None if targets is None else cross_entropy(logits, targets, reduction)

    def new_cache(self, batch_size: int) -> KVCache:
        return KVCache(self.block_size)

    def norm_bound(self) -> float | None:
        """What no value can exceed that a block's norms hand on: n_embd values whose squares have the mean 1. None: not known."""
        is_known = self.config.norm_position == "pre" and not self.config.norm_gain
        return float(self.config.n_embd) ** 0.5 if is_known else None

    def matmul_parameters(self) -> int:
        """The blocks' matrices and the head; a tied matrix is a head."""
        return sum(matrix_size(module) for module in self.transformer.h.modules()) + matrix_size(self.lm_head)

    def flops_per_token(self) -> float:
        """6N + 12·n_layer·n_embd·T (PaLM, Chowdhery et al. 2022, appendix B)."""
        return 6.0 * self.matmul_parameters() + 12.0 * self.config.n_layer * self.config.n_embd * self.block_size


def matrix_size(module: nn.Module) -> int:
    """Weights of a linear layer, quantized or not; 0 for anything else."""
    return getattr(module, "in_features", 0) * getattr(module, "out_features", 0)


@torch.no_grad()
def initialise(model: GPT, config: ModelConfig) -> None:
    """Fresh weights from torch's global seed; either way the untrained loss is about ln V."""
    is_normal = config.init == "normal"
    for name, weight in sorted(model.named_parameters(), key=lambda item: ".h." in item[0]):  # tables and head first
        if weight.dim() < 2:
            continue  # gains start at 1; biases below
        if config.zero_init and name.endswith("c_proj.weight"):
            weight.zero_()
        elif is_normal:  # GPT-2: the sum of 2·n_layer output projections keeps the size of one
            weight.normal_(std=0.02 / (2 * config.n_layer) ** 0.5 if name.endswith("c_proj.weight") else 0.02)
        elif "wte" in name or "wpe" in name:
            weight.normal_(std=0.02 if config.tie else 1.0)
        elif name.startswith("lm_head"):
            weight.normal_(std=0.001)  # near-uniform first guess
        else:
            bound = (3 / weight.size(1)) ** 0.5  # uniform with variance 1 / fan-in
            weight.uniform_(-bound, bound)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()

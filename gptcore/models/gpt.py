"""The decoder-only Transformer, to be read top to bottom: attention, feed-forward, block, stack, head.

Every `config.` below is one difference between the paper of 2017, GPT-2 and today; `model.preset` chooses them together.
Parameters have GPT-2's published names, whatever the preset. Sources: Vaswani et al. 2017 (attention, post-norm), Radford et
al. 2019 (GPT-2: pre-norm, tied head), Su et al. 2021 (rotary positions), Henry et al. 2020 (query-key normalisation), So et
al. 2021 (squared ReLU), Zhang et al. 2019 (zero initialisation). B, T, C: batch, tokens, channels; nh, hs: heads, head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gptcore.config import ModelConfig
from gptcore.models.base import LanguageModel
from gptcore.models.cache import KVCache
from gptcore.models.head import LinearHead
from gptcore.models.layers import ACTIVATIONS, Norm, Rotary, attend, compute_dtype, dropout, rms_norm, rotary_table, split_heads


class CausalSelfAttention(nn.Module):
    """Each position looks at itself and what came before."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.dropout, self.qk_norm = config.n_head, config.dropout, config.qk_norm
        # Queries, keys and values in one product: one large one is faster than three.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, config.bias)

    def forward(self, x: Tensor, rotary: Rotary | None, cache: KVCache | None, layer: int) -> Tensor:
        B, T, C = x.shape
        # What each position looks for, what it is found by, and what it hands over, in n_head small spaces: one large one would
        # have one set of weights to share among all that a position wants to look at.
        q, k, v = split_heads(self.c_attn(x), self.n_head, self.qk_norm, rotary)  # (B, nh, T, hs) each
        mask = None
        if cache is not None:
            # What came before is not computed again: its keys and values cannot change, for nothing looks ahead.
            k, v = cache.extend(layer, k, v)  # (B, nh, S, hs)
            mask = cache.mask(T, k.size(2))  # (T, S)
        # softmax(q kᵀ / √hs) v: a mean of the values, weighted by how well keys fit the query.
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C).to(x.dtype)  # heads side by side again, (B, T, C)
        return dropout(self.c_proj(y), self.dropout, self.training)  # mixes the heads, (B, T, C)


class MLP(nn.Module):
    """The same two matrices at every position, with a nonlinearity between."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout, self.activation = config.dropout, ACTIVATIONS[config.activation]
        # Attention only takes means of values; what is not linear in them happens here. Four times the width is the paper's
        # choice, and puts two thirds of a block's weights here.
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.c_fc(x))  # (B, T, 4C)
        return dropout(self.c_proj(x), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    """Two residual steps: mix over positions, then over channels.

    Each step is added to its input, so a gradient has a way past it, whatever its weights (He et al. 2015).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.is_post_norm = config.norm_position == "post"
        self.ln_1 = Norm(config.n_embd, config.norm, config.norm_gain, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = Norm(config.n_embd, config.norm, config.norm_gain, config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: Rotary | None, cache: KVCache | None, layer: int) -> Tensor:
        if self.is_post_norm:
            # 2017: add, then normalise the sum. Every norm then stands between the layers below and the loss, and without a
            # long warmup the gradients near the top are too large (Xiong et al. 2020).
            x = self.ln_1(x + self.attn(x, rotary, cache, layer))  # (B, T, C)
            return self.ln_2(x + self.mlp(x))  # (B, T, C)
        # Since GPT-2: normalise what a step reads and leave the sum alone, so there is a way from the loss to every layer
        # through additions only. That is why deep stacks learn from the first step on.
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
        # But for the mask, attention does not know an order: without positions what came before would be a bag of tokens.
        self.wpe = nn.Embedding(config.block_size, C) if config.positions == "learned" else None
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        # The stream grows with every step that is added, and the head wants one size whatever the depth; after post-norm blocks
        # it is normalised already.
        self.ln_f = Norm(C, config.norm, config.norm_gain, config.bias) if config.norm_position == "pre" else None
        if config.positions == "rotary":
            # Not persistent: they follow from the config, and a file should hold only what was learnt.
            cos, sin = rotary_table(config.block_size, C // config.n_head)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def embed(self, idx: Tensor, positions: Tensor | None) -> Tensor:
        """What the first block reads, (B, T, C), of ids (B, T) and, where they are learned, the vectors of their positions, (T, C)."""
        x = self.wte(idx)  # (B, T, C)
        if positions is not None:
            x = x + positions  # (B, T, C)
        if self.config.embedding_norm:
            # The rows of a table differ in length with how often their token was seen; the first block should not have to care.
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
            # Once, after all layers: each of them has appended at the same place.
            cache.advance(T)
        return x if self.ln_f is None else self.ln_f(x)  # (B, T, C)


class GPT(LanguageModel):
    """Token ids (B, T) to logits (B, T, V)."""

    has_positions = True
    lm_head: LinearHead

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.block_size, self.vocab_size = config, config.block_size, vocab_size
        self.transformer = Transformer(config, vocab_size)
        self.lm_head = LinearHead(config.n_embd, vocab_size, config.softcap)
        if config.tie:
            # A token means the same where it is read and where it is predicted (Press & Wolf 2017; Inan et al. 2017), and in a
            # small model the two tables would be most of its weights. Larger models do better with two.
            self.lm_head.weight = self.transformer.wte.weight
        initialise(self, config)

    def hidden(self, idx: Tensor, cache: KVCache | None) -> Tensor:
        end = idx.size(1) + (cache.length if cache is not None else 0)
        assert end <= self.block_size, f"{end} tokens do not fit block_size={self.block_size}"
        return self.transformer(idx, cache)

    def new_cache(self, batch_size: int) -> KVCache:
        return KVCache(self.block_size)

    def norm_bound(self) -> float | None:
        """What no value can exceed that a block's norms hand on: n_embd values whose squares have the mean 1. None: not known."""
        # A gain could make values as large as it likes.
        is_known = self.config.norm_position == "pre" and not self.config.norm_gain
        return float(self.config.n_embd) ** 0.5 if is_known else None

    def matmul_parameters(self) -> int:
        """The blocks' matrices and the head; a tied matrix is a head."""
        return sum(matrix_size(module) for module in self.transformer.h.modules()) + matrix_size(self.lm_head)

    def flops_per_token(self) -> float:
        """6N + 12·n_layer·n_embd·T (PaLM, Chowdhery et al. 2022, appendix B)."""
        # The second part is attention's products without weights, q kᵀ and its weights times v: 2·T·n_embd multiplications a token
        # and layer. What the causal mask leaves out is counted too, so that figures compare with those of others.
        return 6.0 * self.matmul_parameters() + 12.0 * self.config.n_layer * self.config.n_embd * self.block_size


def matrix_size(module: nn.Module) -> int:
    """Weights of a linear layer, quantized or not; 0 for anything else."""
    return getattr(module, "in_features", 0) * getattr(module, "out_features", 0)


@torch.no_grad()
def initialise(model: GPT, config: ModelConfig) -> None:
    """Fresh weights from torch's global seed; either way the untrained loss is about ln V."""
    is_normal = config.init == "normal"
    # Tables and head first: so the weights of a seed do not change with the number of blocks before them.
    for name, weight in sorted(model.named_parameters(), key=lambda item: ".h." in item[0]):
        if weight.dim() < 2:
            continue  # gains start at 1; biases below
        if config.zero_init and name.endswith("c_proj.weight"):
            # Every block starts as the identity and finds out by itself how much to say (Zhang et al. 2019): at first the gradient
            # reaches only this matrix, then what is below it.
            weight.zero_()
        elif is_normal:
            # GPT-2: 2·n_layer output projections are added up in the stream. Each as large as 1/√(2·n_layer), their sum has the
            # size of one, whatever the depth.
            weight.normal_(std=0.02 / (2 * config.n_layer) ** 0.5 if name.endswith("c_proj.weight") else 0.02)
        elif "wte" in name or "wpe" in name:
            # A tied table is the head too, whose logits have to start small.
            weight.normal_(std=0.02 if config.tie else 1.0)
        elif name.startswith("lm_head"):
            # Near-uniform first guess, a loss of ln V: otherwise the first steps only unlearn a confidence that nothing earned.
            weight.normal_(std=0.001)
        else:
            # Variance 1 / fan-in keeps a signal's size from layer to layer (LeCun et al. 1998); a uniform distribution within
            # ±√3·σ has the variance σ² and no outliers.
            bound = (3 / weight.size(1)) ** 0.5
            weight.uniform_(-bound, bound)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()

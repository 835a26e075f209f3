"""minGRU: a recurrence whose gates do not see the state, so that a whole text is learnt at once (Feng et al. 2024, "Were RNNs all we needed?").

    h_t = (1 - z_t) · h_(t-1) + z_t · g(x_t W),     z_t = sigmoid(x_t W_z)

is linear in h, hence a scan: all h_t in parallel by cumulative sums of logarithms (Heinsen 2023), which needs positive states: g(x) is
x + 1/2 above zero and sigmoid(x) below. A block is a causal convolution over 4 tokens, the recurrence, and a feed-forward part, each
on the normalised residual stream.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.config import ModelConfig
from gptcore.models.layers import Norm
from gptcore.models.rnn import Recurrent

KERNEL = 4  # tokens that the convolution sees

BlockState = tuple[Tensor, Tensor]  # last KERNEL - 1 inputs of the convolution (B, 3, C), hidden state (B, 1, D)


def log_g(x: Tensor) -> Tensor:
    """Logarithm of g, without overflow on either side."""
    return torch.where(x >= 0, (F.relu(x) + 0.5).log(), -F.softplus(-x))


def scan(gate: Tensor, candidate: Tensor, h: Tensor | None) -> Tensor:
    """All states of h_t = (1 - z_t) h_(t-1) + z_t g_t, float32. gate, candidate: (B, T, D) before their functions; h: (B, 1, D) or None for 0."""
    gate, candidate = gate.float(), candidate.float()
    if gate.size(1) == 1:  # one more token in generation
        z, g = gate.sigmoid(), log_g(candidate).exp()
        return z * g if h is None else torch.lerp(h, g, z)
    # In logarithms: the product of a thousand factors below 1 is 0 in float32, the sum of their logarithms is a number.
    log_keep = -F.softplus(gate)  # log(1 - z)
    log_new = -F.softplus(-gate) + log_g(candidate)  # log(z g)
    if h is not None:  # the old state is one more value before the first, kept whole
        log_keep = F.pad(log_keep, (0, 0, 1, 0))
        log_new = torch.cat((h.clamp_min(1e-30).log(), log_new), dim=1)
    kept = log_keep.cumsum(1)  # how much of a value at the start is left at t
    states = (kept + (log_new - kept).logcumsumexp(1)).exp()
    return states if h is None else states[:, 1:]  # (B, T, D)


class MinGRULayer(nn.Module):
    """C channels in, `width` states, C channels out."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.gate_and_candidate = nn.Linear(channels, 2 * width, bias=False)
        self.c_proj = nn.Linear(width, channels, bias=False)

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        gate, candidate = self.gate_and_candidate(x).chunk(2, dim=-1)  # (B, T, D) each
        # Sums over the whole text: in 16 bits the end of a long one would be added to nothing.
        with torch.autocast(x.device.type, enabled=False):
            states = scan(gate, candidate, h)  # (B, T, D)
        return self.c_proj(states.to(x.dtype)), states[:, -1:]


class CausalConv(nn.Module):
    """Each channel on its own, over the last KERNEL tokens."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The gates do not see what came before, so a few tokens are mixed first: without it a gate cannot know which word a
        # letter ends.
        self.conv = nn.Conv1d(channels, channels, KERNEL, groups=channels)

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        # Padded on the left only: nothing may look ahead.
        before = x.new_zeros(len(x), KERNEL - 1, x.size(2)) if before is None else before.to(x.dtype)
        seen = torch.cat((before, x), dim=1)  # (B, 3 + T, C)
        return self.conv(seen.mT).mT, seen[:, -(KERNEL - 1) :]


class MinGRUBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.dropout = config.dropout
        self.norms = nn.ModuleList(Norm(C, "rms", True, False) for _ in range(3))
        self.conv = CausalConv(C)
        self.gru = MinGRULayer(C, round(config.expansion * C))
        self.c_fc = nn.Linear(C, 4 * C, bias=False)
        self.c_proj = nn.Linear(4 * C, C, bias=False)

    def forward(self, x: Tensor, state: BlockState | None) -> tuple[Tensor, BlockState]:
        before, h = (None, None) if state is None else state
        y, before = self.conv(self.norms[0](x), before)
        x = x + F.dropout(y, self.dropout, self.training)  # (B, T, C)
        y, h = self.gru(self.norms[1](x), h)
        x = x + F.dropout(y, self.dropout, self.training)  # (B, T, C)
        y = self.c_proj(F.gelu(self.c_fc(self.norms[2](x))))
        return x + F.dropout(y, self.dropout, self.training), (before, h)  # (B, T, C)


class MinGRU(Recurrent):
    """`n_layer` blocks of width `n_embd` with `expansion` · n_embd states each."""

    def build_layers(self, config: ModelConfig) -> None:
        self.blocks = nn.ModuleList(MinGRUBlock(config) for _ in range(config.n_layer))
        self.ln_f = Norm(config.n_embd, "rms", True, False)

    def recur(self, x: Tensor, state: tuple[BlockState, ...] | None) -> tuple[Tensor, tuple[BlockState, ...]]:
        new = []
        for block, old in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            x, kept = block(x, old)
            new.append(kept)
        return self.ln_f(x), tuple(new)

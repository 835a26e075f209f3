"""The recurrent baselines under the GPT's contract: embedding, LSTM or GRU layers, head.

LSTM: Hochreiter & Schmidhuber 1997; GRU: Cho et al. 2014. On a GPU torch runs them with cuDNN. `MinGRU` has a file of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.config import ModelConfig
from gptcore.models.base import LanguageModel
from gptcore.models.head import LinearHead


@dataclass
class RecurrentState:
    """What a recurrent model remembers, whatever the length of the text; None before the first token.

    LSTM: (h, c), GRU: h, each (n_layer, B, C); minGRU: its own. `detach` cuts the gradient, not the memory.
    """

    value: Any = None

    def detach(self) -> None:
        self.value = _detached(self.value)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    return None if value is None else tuple(_detached(part) for part in value)


class Recurrent(LanguageModel):
    """Embedding, a recurrence, head; the state starts at zero in every window of training."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.block_size, self.vocab_size = config, config.block_size, vocab_size
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.build_layers(config)
        self.lm_head = LinearHead(config.n_embd, vocab_size)
        if config.init == "normal":
            for name, module in self.named_modules():
                if isinstance(module, nn.Linear | nn.Embedding):  # the rest as torch makes it, as nanoGPT does
                    is_output = name.endswith("c_proj")
                    nn.init.normal_(module.weight, std=0.02 / (2 * config.n_layer) ** 0.5 if is_output else 0.02)
        else:
            nn.init.normal_(self.wte.weight)
            # Near-uniform first guess, as the GPT's.
            nn.init.normal_(self.lm_head.weight, std=0.001)

    def build_layers(self, config: ModelConfig) -> None:
        """Make what stands between embedding and head."""
        raise NotImplementedError(type(self).__name__)

    def recur(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(B, T, C) and the state after what came before (None: nothing) to what the head reads, (B, T, C), and the new state."""
        raise NotImplementedError(type(self).__name__)

    def hidden(self, idx: Tensor, cache: RecurrentState | None) -> Tensor:
        # Nothing of the order of tokens has to be told here: a recurrence reads them one after the other.
        x = F.dropout(self.wte(idx), self.config.dropout, self.training)  # (B, T, C)
        x, state = self.recur(x, None if cache is None else cache.value)  # (B, T, C)
        if cache is not None:
            cache.value = state
        return x

    def new_cache(self, batch_size: int) -> RecurrentState:
        return RecurrentState()

    def matmul_parameters(self) -> int:
        inner = (p for name, p in self.named_parameters() if not name.startswith(("wte", "lm_head")))
        return sum(p.numel() for p in inner if p.dim() > 1) + self.vocab_size * self.config.n_embd


class RNN(Recurrent):
    """`n_layer` recurrent layers of width `n_embd`."""

    layer: type[nn.LSTM] | type[nn.GRU]

    def build_layers(self, config: ModelConfig) -> None:
        # torch drops out between layers, of which there is none below a single one, and warns.
        dropout = config.dropout if config.n_layer > 1 else 0.0
        self.rnn = self.layer(config.n_embd, config.n_embd, config.n_layer, batch_first=True, dropout=dropout)

    def recur(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.rnn(x, state)


class LSTM(RNN):
    layer = nn.LSTM

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        for name, bias in self.rnn.named_parameters():
            # Forget gates start open (Jozefowicz et al. 2015): half closed they would halve the memory, and the gradient that comes back
            # through it, at every token. torch orders the gates: input, forget, cell, output.
            if name.startswith("bias_ih"):
                nn.init.ones_(bias[config.n_embd : 2 * config.n_embd])


class GRU(RNN):
    layer = nn.GRU

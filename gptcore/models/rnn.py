"""The recurrent baseline: embedding, LSTM layers, head (Hochreiter & Schmidhuber 1997), under the GPT's contract."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.config import ModelConfig
from gptcore.models.base import LanguageModel, cross_entropy, without_src


@dataclass
class RecurrentState:
    """Hidden and cell state, each (n_layer, B, C): the whole memory, whatever the length of the text."""

    h: Tensor | None = None
    c: Tensor | None = None


class LSTM(LanguageModel):
    """`n_layer` LSTM layers of width `n_embd`; the state starts at zero in every window of training."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.block_size, self.vocab_size = config, config.block_size, vocab_size
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.lstm = nn.LSTM(
            config.n_embd,
            config.n_embd,
            config.n_layer,
            batch_first=True,
            dropout=config.dropout if config.n_layer > 1 else 0.0,
        )
        self.lm_head = nn.Linear(config.n_embd, vocab_size, bias=False)
        nn.init.normal_(self.wte.weight)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for name, bias in self.lstm.named_parameters():
            if name.startswith("bias_ih"):  # forget gates start open (Jozefowicz et al. 2015)
                nn.init.ones_(bias[config.n_embd : 2 * config.n_embd])

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        src: Tensor | None = None,
        cache: RecurrentState | None = None,
        reduction: str = "mean",
    ) -> tuple[Tensor | None, Tensor | None]:
        without_src(src)
        x = F.dropout(self.wte(idx), self.config.dropout, self.training)  # (B, T, C)
        state = None if cache is None or cache.h is None or cache.c is None else (cache.h, cache.c)
        x, (h, c) = self.lstm(x, state)  # (B, T, C)
        if cache is not None:
            cache.h, cache.c = h, c
        logits = self.lm_head(x)  # (B, T, V)
        return logits, None if targets is None else cross_entropy(logits, targets, reduction)

    def new_cache(self, batch_size: int) -> RecurrentState:
        return RecurrentState()

    def matmul_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters() if p.dim() > 1) - self.wte.weight.numel()

"""The bigram model of the notes: a table of logits, one row for each last token. The floor for all others."""

from __future__ import annotations

from torch import Tensor, nn

from gptcore.config import ModelConfig
from gptcore.models.base import LanguageModel, cross_entropy, without_src


class Bigram(LanguageModel):
    """The next token given this one and nothing else; `logits = wte[idx]`, a (V, V) table."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.block_size, self.vocab_size = config.block_size, vocab_size
        self.wte = nn.Embedding(vocab_size, vocab_size)
        nn.init.normal_(self.wte.weight, std=0.02)  # the notes' N(0, 1) starts above ln V

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        src: Tensor | None = None,
        cache: object = None,
        reduction: str = "mean",
    ) -> tuple[Tensor | None, Tensor | None]:
        without_src(src)
        logits = self.wte(idx)  # (B, T, V)
        return logits, None if targets is None else cross_entropy(logits, targets, reduction)

    def new_cache(self, batch_size: int) -> None:
        return None  # the last token is all it knows

    def matmul_parameters(self) -> int:
        return 0  # a look-up

"""The bigram model of the notes: a table of logits, one row for each last token. The floor for all others."""

from __future__ import annotations

from torch import Tensor, nn

from gptcore.config import ModelConfig
from gptcore.models.base import LanguageModel
from gptcore.models.losses import cross_entropy


class Bigram(LanguageModel):
    """The next token given this one and nothing else; `logits = wte[idx]`, a (V, V) table."""

    has_layers = False

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.block_size, self.vocab_size = config.block_size, vocab_size
        self.wte = nn.Embedding(vocab_size, vocab_size)
        nn.init.normal_(self.wte.weight, std=0.02)  # the notes' N(0, 1) starts above ln V

    def hidden(self, idx: Tensor, cache: object) -> Tensor:
        """There is nothing between table and logits: (B, T, V)."""
        return self.wte(idx)

    def read_out(self, x: Tensor, targets: Tensor | None, reduction: str) -> tuple[Tensor | None, Tensor | None]:
        return x, None if targets is None else cross_entropy(x, targets, reduction)

    def new_cache(self, batch_size: int) -> None:
        return None  # the last token is all it knows

    def matmul_parameters(self) -> int:
        return 0  # a look-up

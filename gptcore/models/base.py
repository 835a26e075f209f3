"""What every language model here shares: the contract, its size and its cost."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Nats per target token in float32; targets of -1 count neither in the sum nor in the mean."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1, reduction=reduction)
    return loss.view_as(targets) if reduction == "none" else loss


class LanguageModel(nn.Module):
    """Base of all models. `vocab_size` is the number of ids it can emit, padding included."""

    block_size: int
    vocab_size: int
    has_positions: bool = False  # True where the context cannot grow beyond block_size

    def new_cache(self, batch_size: int) -> Any:
        """State for generation of at most `block_size` further tokens; to be passed to every forward."""
        raise NotImplementedError(type(self).__name__)

    def matmul_parameters(self) -> int:
        """Parameters that are matrix-multiplied for each token: look-up tables and gains do not count."""
        raise NotImplementedError(type(self).__name__)

    def flops_per_token(self) -> float:
        """Training FLOPs of one token, forward and backward (6N, Kaplan et al. 2020, plus attention)."""
        return 6.0 * self.matmul_parameters()

    def count_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def without_src(src: Tensor | None) -> None:
    assert src is None, "only an encoder-decoder takes src"

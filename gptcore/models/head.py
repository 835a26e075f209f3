"""The end of a model: hidden states to logits, or to nats. One interface, however the head's weights are stored."""

from __future__ import annotations

from torch import Tensor, nn

from gptcore.models.layers import compute_dtype
from gptcore.models.losses import PIECE_LOGITS, cross_entropy, head_cross_entropy, piecewise_cross_entropy, soft_cap


class Head:
    """What is asked of a linear layer that ends a model; for any layer with `out_features`, whatever its weights are.

    softcap: bound of the logits; 0: none.
    """

    out_features: int
    softcap: float = 0.0

    def logits(self, x: Tensor) -> Tensor:
        """(…, C) → (…, V)."""
        return soft_cap(self(x), self.softcap)  # type: ignore[operator]  # the layer's own product

    def loss(self, x: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Nats per target token of hidden states (B, T, C) against targets (B, T); -1 counts neither in the sum nor in the mean."""
        if self.is_large(targets):
            return piecewise_cross_entropy(x, self.logits, targets, reduction, self.out_features)
        return cross_entropy(self.logits(x), targets, reduction)

    def is_large(self, targets: Tensor) -> bool:
        """Whether the logits of so many tokens are too many to be in memory at once."""
        return targets.numel() * self.out_features > PIECE_LOGITS[targets.device.type]


class LinearHead(Head, nn.Linear):
    """A head with float weights, to be trained: a large batch's gradients are made together with its loss."""

    in_fp8 = False  # products in eight bits while training

    def __init__(self, channels: int, vocab_size: int, softcap: float = 0.0) -> None:
        # Without a bias: it could only learn how frequent each token is, and the weights do that as well.
        super().__init__(channels, vocab_size, bias=False)
        self.softcap = softcap

    def product_weight(self) -> Tensor:
        """What x is multiplied with, (V, C)."""
        return self.weight

    def loss(self, x: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        if not (self.in_fp8 or self.is_large(targets)):
            return super().loss(x, targets, reduction)
        # Autocast does not reach inside the loss in pieces, so x comes in the type that the product would have.
        x = x.to(compute_dtype(x))
        return head_cross_entropy(x, self.product_weight(), targets, reduction, self.softcap, self.in_fp8 and self.training)

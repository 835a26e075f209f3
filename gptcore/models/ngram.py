"""The n-gram floor: counts of what followed the last `order - 1` tokens, smoothed with shorter contexts (interpolated Kneser–Ney,
Kneser & Ney 1995, in the form of Chen & Goodman 1999 with one discount an order).

Nothing is trained: `fit` counts the training split once, in seconds. The same contract and files as any other model.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore.config import ModelConfig, UserError
from gptcore.models.base import LanguageModel

PIECE = 1 << 24  # probabilities made at a time, at most


class NGram(LanguageModel):
    """p(next | last order - 1 tokens); a text's first tokens have shorter contexts.

    For each order k the k-grams seen are sorted int64 numbers `context · V + next` with their counts; for orders below the longest
    a count is the number of different tokens that were seen before the k-gram (its versatility, not its frequency).
    """

    is_trained = False
    discounts: Tensor

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.block_size, self.vocab_size, self.order = config, config.block_size, vocab_size, config.order
        # k-grams are int64 numbers in base V.
        if vocab_size**self.order >= 2**63:
            longest = int(63 / np.log2(vocab_size))
            raise UserError(f"model.order={self.order}: too long for a vocabulary of {vocab_size}; at most {longest}")
        for k in range(1, self.order + 1):
            self.register_buffer(f"keys_{k}", torch.zeros(0, dtype=torch.int64))
            self.register_buffer(f"counts_{k}", torch.zeros(0))
        self.register_buffer("discounts", torch.full((self.order,), 0.5))

    def fit(self, tokens: np.ndarray) -> None:
        """Count a text, int ids (n,)."""
        V, n = self.vocab_size, len(tokens)
        ids = np.asarray(tokens, dtype=np.int64)
        if n < self.order:
            raise UserError(f"model.order={self.order}: the text has only {n} tokens")
        codes = np.zeros(n - self.order + 1, dtype=np.int64)
        for offset in range(self.order):
            codes = codes * V + ids[offset : offset + len(codes)]
        keys, counts = np.unique(codes, return_counts=True)
        for k in range(self.order, 0, -1):
            once, twice = int((counts == 1).sum()), int((counts == 2).sum())
            setattr(self, f"keys_{k}", torch.from_numpy(keys).to(self.discounts.device))
            setattr(self, f"counts_{k}", torch.from_numpy(counts).to(self.discounts.device, torch.float32))
            # How much too often a k-gram that was seen is believed: estimated from those that were seen once and twice (Ney et
            # al. 1994).
            self.discounts[k - 1] = once / (once + 2 * twice) if once else 0.5
            # From here on counts are of different left neighbours: "Francisco" is frequent, but after one word only, so a text
            # that does not say "San" should not expect it.
            keys, counts = np.unique(keys % V ** (k - 1), return_counts=True)

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Tables have whatever size the text gave them."""
        assert tensors.keys() == self.weights().keys(), "weights of another order"
        for name, tensor in tensors.items():
            setattr(self, name, tensor.to(self.discounts.device))

    def hidden(self, idx: Tensor, cache: list[Tensor] | None) -> Tensor:
        """[…, k] is the number of the last k tokens at each position, -1 where there are not so many: (B, T, order)."""
        text = torch.cat((cache[0], idx), dim=1) if cache else idx  # (B, S)
        if cache is not None:
            cache[:] = [text[:, text.size(1) - min(text.size(1), self.order - 1) :]]
        contexts = [self._contexts(text, k)[:, -idx.size(1) :] for k in range(1, self.order + 1)]
        return torch.stack(contexts, dim=-1)

    def read_out(self, x: Tensor, targets: Tensor | None, reduction: str) -> tuple[Tensor | None, Tensor | None]:
        """Logits are log-probabilities (B, T, V); with targets they are None, so that a large vocabulary fits in memory."""
        rows = max(1, PIECE // self.vocab_size)
        pieces = x.flatten(0, 1).split(rows)
        if targets is None:
            return torch.cat([self._log_probabilities(piece) for piece in pieces]).view(*x.shape[:2], -1), None
        wanted = targets.flatten()[:, None].clamp_min(0).split(rows)
        nats = [-self._log_probabilities(piece).gather(1, ids)[:, 0] for piece, ids in zip(pieces, wanted, strict=True)]
        losses = torch.cat(nats).view_as(targets).masked_fill(targets < 0, 0.0)
        if reduction == "none":
            return None, losses
        return None, losses.sum() / (targets >= 0).sum() if reduction == "mean" else losses.sum()

    def _contexts(self, text: Tensor, k: int) -> Tensor:
        """Number of the k - 1 tokens up to each position (B, S), or -1."""
        code = torch.zeros_like(text)
        for back in range(k - 2, -1, -1):
            shifted = F.pad(text, (back, 0))[:, : text.size(1)]  # a text may be shorter than the context
            code = code * self.vocab_size + shifted
        code[:, : max(0, k - 2)] = -1
        return code

    def _log_probabilities(self, contexts: Tensor) -> Tensor:
        """(rows, V) of contexts (rows, order), from the uniform guess through ever longer ones."""
        rows = len(contexts)
        p = torch.full((rows, self.vocab_size), 1 / self.vocab_size, device=self.discounts.device)
        for k in range(1, self.order + 1):
            context = contexts[:, k - 1]
            keys, counts = getattr(self, f"keys_{k}"), getattr(self, f"counts_{k}")
            # Sorted numbers instead of a hash table: what follows a context lies side by side, and one search finds it for all
            # positions at once.
            low = torch.searchsorted(keys, context * self.vocab_size)
            high = torch.searchsorted(keys, (context + 1) * self.vocab_size)
            high = torch.where(context < 0, low, high)
            different = high - low  # (rows,) next tokens seen after this context
            row = torch.repeat_interleave(torch.arange(rows, device=p.device), different)
            place = torch.arange(len(row), device=p.device) - (different.cumsum(0) - different)[row] + low[row]
            seen = counts[place]
            total = torch.zeros(rows, device=p.device).index_add_(0, row, seen)
            discount = self.discounts[k - 1]
            # what the discounts took is given to the shorter context; all of it where nothing was seen
            share = torch.where(different > 0, discount * different / total.clamp_min(1), 1.0)
            p = p * share[:, None]
            p[row, keys[place] % self.vocab_size] += (seen - discount) / total[row]
        # Never quite 0: one token at minus infinity would be the whole loss.
        return p.clamp_min(1e-30).log()

    def new_cache(self, batch_size: int) -> list[Tensor]:
        return []

    def count_parameters(self) -> int:
        """Counts kept, of all orders."""
        return sum(len(getattr(self, f"counts_{k}")) for k in range(1, self.order + 1))

    def matmul_parameters(self) -> int:
        return 0  # look-ups

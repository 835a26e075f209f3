"""What a Transformer remembers of a text it has read: keys and values, so that one more token costs one token."""

from __future__ import annotations

from torch import Tensor


class KVCache:
    """Keys and values of the tokens seen so far, one pair of (B, nh, block_size, hs) a layer."""

    def __init__(self, n_layer: int, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.keys = [like.new_zeros(shape) for _ in range(n_layer)]
        self.values = [like.new_zeros(shape) for _ in range(n_layer)]
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, nh, T, hs) and return all so far, (B, nh, length + T, hs)."""
        end = self.length + k.size(2)
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

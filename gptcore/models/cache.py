"""What a Transformer remembers of a text it has read: keys and values, so that one more token costs one token."""

from __future__ import annotations

from torch import Tensor


class KVCache:
    """Keys and values of the tokens seen so far, one pair of (B, nh, block_size, hs) a layer, in the type of the first ones that come."""

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self.shape = shape
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, nh, T, hs) and return all so far, (B, nh, length + T, hs)."""
        if layer == len(self.keys):
            self.keys.append(k.new_empty(self.shape))  # memory comes as it is filled
            self.values.append(v.new_empty(self.shape))
        end = self.length + k.size(2)
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

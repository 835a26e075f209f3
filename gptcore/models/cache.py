"""What a Transformer remembers of a text it has read: keys and values, so that one more token costs one token."""

from __future__ import annotations

from torch import Tensor

FIRST_TOKENS = 128  # room made at first; it doubles whenever it is full


class KVCache:
    """Keys and values of the tokens seen so far, a pair of (B, nh, room, hs) a layer, in the type of the first ones that come.

    Room for the whole block_size at once would be memory to be cleared, tens of MiB of it, before a short text is continued.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, nh, T, hs) and return all so far, (B, nh, length + T, hs)."""
        end = self.length + k.size(2)
        for kept, new in ((self.keys, k), (self.values, v)):
            if layer == len(kept):
                kept.append(self._with_room(new[:, :, :0], end))
            elif end > kept[layer].size(2):
                kept[layer] = self._with_room(kept[layer][:, :, : self.length], end)
            kept[layer][:, :, self.length : end] = new
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def _with_room(self, old: Tensor, tokens: int) -> Tensor:
        """`old` in a tensor that holds at least `tokens`."""
        B, nh, length, hs = old.shape
        room = min(self.block_size, max(FIRST_TOKENS, tokens, 2 * length))
        new = old.new_empty(B, nh, room, hs)
        new[:, :, :length] = old
        return new

"""What a Transformer remembers of a text it has read: keys and values, so that one more token costs one token."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_TOKENS = 128  # room made at first; it doubles whenever it is full
ROOM_STEP = 64  # of a fixed cache: attention's kernels like even numbers


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
        length, end = self.length, self.length + k.size(2)
        if layer == len(self.keys):
            self.keys.append(self._with_room(k[:, :, :0], end))
            self.values.append(self._with_room(v[:, :, :0], end))
        keys, values = self.keys[layer], self.values[layer]
        if end > keys.size(2):
            keys = self.keys[layer] = self._with_room(keys[:, :, :length], end)
            values = self.values[layer] = self._with_room(values[:, :, :length], end)
        # Written into room that is there: joining tensors would copy all that was read, for every token.
        keys[:, :, length:end], values[:, :, length:end] = k, v
        return keys[:, :, :end], values[:, :, :end]

    def places(self, T: int) -> slice | Tensor:
        """The positions of the next T tokens, as an index of tables by position."""
        return slice(self.length, self.length + T)

    def mask(self, T: int, S: int) -> Tensor | None:
        """Which of S tokens each of the newest T may see, (T, S); None: all, or those before it where T == S."""
        # One new token may see everything; as many as there are in all is the causal case, which attention's kernels know
        # without a mask.
        if not 1 < T < S:
            return None
        return torch.ones(T, S, dtype=torch.bool, device=self.keys[0].device).tril(S - T)

    def advance(self, T: int) -> None:
        """The next T tokens are in the cache of every layer."""
        self.length += T

    def _with_room(self, old: Tensor, tokens: int) -> Tensor:
        """`old` in a tensor that holds at least `tokens`."""
        B, nh, length, hs = old.shape
        # Doubling: all copies together cost no more than one of the final size.
        room = min(self.block_size, max(FIRST_TOKENS, tokens, 2 * length))
        new = old.new_empty(B, nh, room, hs)
        new[:, :, :length] = old
        return new


class FixedCache(KVCache):
    """The same in memory that never moves, with the length on the device too: reading one token is the same kernels on the same memory
    for every token, so it can be recorded as a CUDA graph. Attention then reads all of the room, the empty part under a mask.
    """

    def __init__(self, block_size: int, room: int, device: torch.device) -> None:
        super().__init__(block_size)
        self.room = min(block_size, -(-room // ROOM_STEP) * ROOM_STEP)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)  # the length
        self._numbers = torch.arange(self.room, device=device)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if k.size(2) > 1 or layer == len(self.keys):
            k, v = super().extend(layer, k, v)
            return (k, v) if k.size(2) > 1 else (self.keys[layer], self.values[layer])
        # The place comes from the device: a slice would be a number of Python's, and a recording would write to the same place
        # for ever.
        self.keys[layer].index_copy_(2, self._at, k)
        self.values[layer].index_copy_(2, self._at, v)
        return self.keys[layer], self.values[layer]

    def places(self, T: int) -> slice | Tensor:
        return super().places(T) if T > 1 else self._at

    def mask(self, T: int, S: int) -> Tensor | None:
        return super().mask(T, S) if T > 1 else (self._numbers <= self._at)[None]  # (1, room)

    def advance(self, T: int) -> None:
        super().advance(T)
        self._at += T

    def _with_room(self, old: Tensor, tokens: int) -> Tensor:
        assert tokens <= self.room
        assert not old.size(2)
        B, nh, _, hs = old.shape
        return old.new_zeros(B, nh, self.room, hs)  # a weight of 0 does not undo what is not a number

"""Room 4, batches: which tokens are learnt from when. Sample i is a pure function of (seed, i).

So a resume needs one number, and the order is the same for any number of ranks and any micro-batch size: a rank takes
the samples it is told. An epoch covers the tokens, read as a circle from an offset of its own, with windows of
`block_size` in an order of its own: every token is a target once per epoch, but for fewer than `block_size` of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from gptcore.config import UserError
from gptcore.shards import TokenView

Tokens = np.ndarray | TokenView


class BatchSampler:
    """Training windows over the (n,) ids of one split.

    Raises UserError if they do not hold one window of `block_size` + 1 tokens.
    """

    def __init__(self, tokens: Tokens, block_size: int, seed: int) -> None:
        if len(tokens) < block_size + 1:
            raise UserError(
                f"{len(tokens)} tokens do not fill one window of model.block_size + 1 = {block_size + 1}; give more text, or lower model.block_size"
            )
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        self.windows_per_epoch = len(tokens) // block_size
        self._windows = _Windows(tokens, block_size + 1)
        self._epoch = -1
        self._offset = 0
        self._order = np.empty(0, dtype=np.int64)

    def batch(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples `start` … `start + count - 1` as (x, y), int64 (count, T) each; y is x shifted by one token."""
        windows = self._windows.gather(self.starts(start, count)).astype(np.int64)  # (count, T + 1)
        return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])

    def starts(self, start: int, count: int) -> np.ndarray:
        """(count,) int64: the position of each sample's first input token; its window may run over the end to the beginning."""
        assert start >= 0, start
        assert count >= 1, count
        samples = np.arange(start, start + count)
        epochs, places = np.divmod(samples, self.windows_per_epoch)
        starts = np.empty(count, dtype=np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            self._enter_epoch(epoch)
            here = epochs == epoch
            starts[here] = self._offset + self._order[places[here]] * self.block_size
        return starts % len(self.tokens)

    def _enter_epoch(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        digest = hashlib.sha256(f"{self.seed}:{epoch}".encode()).digest()
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        self._order = rng.permutation(self.windows_per_epoch)
        self._offset = int.from_bytes(digest[16:], "little") % self.block_size
        self._epoch = epoch


def val_batches(tokens: Tokens, block_size: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Walk (n,) ids once, in order: (x, y), int64 (b, T) each, b ≤ `batch_size`.

    Every token after the first is a target exactly once. The last window is filled up with inputs 0 and targets -1,
    which a loss ignores. The batch size changes nothing but the grouping. Fewer than two tokens give nothing.
    """
    stride = block_size * batch_size
    for begin in range(0, len(tokens) - 1, stride):
        flat = tokens[begin : begin + stride + 1].astype(np.int64)
        n_targets = len(flat) - 1
        rows = -(-n_targets // block_size)
        x = np.zeros(rows * block_size, dtype=np.int64)
        y = np.full(rows * block_size, -1, dtype=np.int64)
        x[:n_targets], y[:n_targets] = flat[:-1], flat[1:]
        yield x.reshape(rows, block_size), y.reshape(rows, block_size)


class _Windows:
    """Copies windows of `length` tokens, whole rows at a time where a window lies within one shard."""

    def __init__(self, tokens: Tokens, length: int) -> None:
        self.tokens, self.length = tokens, length
        parts = tokens.parts if isinstance(tokens, TokenView) else [tokens]
        self.parts: list[tuple[int, np.ndarray]] = []  # position of the first window, all windows of a part (views)
        begin = 0
        for part in parts:
            if len(part) >= length:
                self.parts.append((begin, np.lib.stride_tricks.sliding_window_view(part, length)))
            begin += len(part)

    def gather(self, starts: np.ndarray) -> np.ndarray:
        """(count, length) ids; the tokens are a circle."""
        rows = np.empty((len(starts), self.length), dtype=self.tokens.dtype)
        rest = np.ones(len(starts), dtype=bool)
        for begin, windows in self.parts:
            inside = (starts >= begin) & (starts < begin + len(windows))
            rows[inside] = windows[starts[inside] - begin]
            rest &= ~inside
        if rest.any():  # over the end, or from one shard into the next
            rows[rest] = self.tokens[(starts[rest, None] + np.arange(self.length)) % len(self.tokens)]
        return rows

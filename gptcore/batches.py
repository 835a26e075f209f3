"""Room 4, batches: which tokens are learnt from when. Sample i is a pure function of (seed, i).

So a resume needs one number, and the order is the same for any number of ranks and any micro-batch size: a rank takes
the samples it is told. An epoch covers a source's tokens, read as a circle from an offset of its own, with windows of
`block_size` in an order of its own: every token is a target once per epoch, but for fewer than `block_size` of them.

Samplers: `BatchSampler` (one source), `MixtureSampler` (several, interleaved by weight), `ChunkSampler` (the course's
random chunks, a study arm); around any of them `Prefetcher` (a thread ahead of the trainer) or `DeviceTokens` (all ids on the device).
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gptcore.config import ExperimentConfig, UserError
from gptcore.shards import ShardSet, TokenView

if TYPE_CHECKING:
    import torch

Tokens = np.ndarray | TokenView

CYCLE = 1 << 14  # samples after which a mixture has kept its weights exactly


class Sampler(Protocol):
    """What the trainer reads from."""

    def batch(self, start: int, count: int) -> tuple[Any, Any]:
        """Samples `start` … `start + count - 1` as (x, y), int64 (count, T) each; y is x shifted by one token."""


def build_sampler(shards: ShardSet, config: ExperimentConfig) -> Prefetcher:
    """The experiment's training samples (`data.order`), read one batch ahead of the trainer.

    Raises UserError if the training split, or one of its weighted sources, does not hold one window.
    """
    block_size, seed = config.model.block_size, config.train.seed
    if config.data.order != "epochs":
        tokens = shards.tokens("train")
        rows = len(tokens) if config.data.order == "random" else config.train.global_batch_size
        return Prefetcher(ChunkSampler(tokens, block_size, seed, rows))
    sources = shards.sources()
    if len(sources) == 1:
        return Prefetcher(BatchSampler(sources[0].tokens, block_size, seed))
    samplers = [BatchSampler(source.tokens, block_size, seed, stream, source.name) for stream, source in enumerate(sources)]
    return Prefetcher(MixtureSampler(samplers, [source.weight for source in sources], seed))


class BatchSampler(Sampler):
    """Training windows over the (n,) ids of one source.

    `stream` tells the sources of a mixture apart: each has orders of its own. Raises UserError if the ids do not hold one
    window of `block_size` + 1 tokens.
    """

    def __init__(self, tokens: Tokens, block_size: int, seed: int, stream: int = 0, name: str = "") -> None:
        _check_window(tokens, block_size, name)
        self.tokens, self.block_size, self.seed, self.stream = tokens, block_size, seed, stream
        self.windows_per_epoch = len(tokens) // block_size
        self._windows = _Windows(tokens, block_size + 1)
        self._epoch = -1
        self._offset = 0
        self._order = np.empty(0, dtype=np.int64)

    def batch(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        return _shifted(self.windows(np.arange(start, start + count)))

    def windows(self, samples: np.ndarray) -> np.ndarray:
        """(count, T + 1) ids of the samples with these ascending numbers."""
        return self._windows.gather(self.places(samples))

    def starts(self, start: int, count: int) -> np.ndarray:
        """(count,) int64: the position of each sample's first input token; its window may run over the end to the beginning."""
        assert start >= 0, start
        assert count >= 1, count
        return self.places(np.arange(start, start + count))

    def places(self, samples: np.ndarray) -> np.ndarray:
        """`starts` for ascending sample numbers."""
        # A counter, not a stream (as in counter-based generators, Salmon et al. 2011): nothing has to be replayed to know
        # sample i. A resume starts at any number in no time, and ranks and micro-batches read their shares without talking to
        # each other.
        epochs, places = np.divmod(samples, self.windows_per_epoch)
        starts = np.empty(len(samples), dtype=np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            self._enter_epoch(epoch)
            here = epochs == epoch
            starts[here] = self._offset + self._order[places[here]] * self.block_size
        # A circle: on a line the tokens before the offset would be left out as well.
        return starts % len(self.tokens)

    def _enter_epoch(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        key = f"{self.seed}:{epoch}" + (f":{self.stream}" if self.stream else "")
        # Hashed, so that neighbouring seeds and epochs have nothing in common; Philox, whose numbers are the same on every
        # machine and in every version.
        digest = hashlib.sha256(key.encode()).digest()
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        # A permutation, not draws with replacement: those leave more than a third of the text unread in an epoch (1/e), and
        # read a quarter twice or more. Without a permutation neighbours in a text would be neighbours in a batch, whose
        # gradients are alike.
        self._order = rng.permutation(self.windows_per_epoch)
        # Windows cut at the same places every epoch would ask for the same tokens with the same short contexts each time:
        # whatever opens a window is always guessed from nothing. What is left over at the end of an epoch, fewer than
        # block_size tokens, is other text every time, too.
        self._offset = int.from_bytes(digest[16:], "little") % self.block_size
        self._epoch = epoch


class MixtureSampler(Sampler):
    """Several sources, each with epochs of its own, interleaved so that every CYCLE samples keep the weights.

    The cycle is shuffled anew each time round; sample i of the mixture is sample j of one source, and j needs no memory.
    """

    def __init__(self, samplers: Sequence[BatchSampler], weights: Sequence[float], seed: int) -> None:
        assert len(samplers) == len(weights) >= 1, (len(samplers), len(weights))
        assert min(weights) > 0, weights
        self.samplers, self.seed = list(samplers), seed
        self.block_size = samplers[0].block_size
        # Whole numbers a cycle instead of a draw a sample: the weights are kept exactly, and how often a source came before is
        # arithmetic.
        self.per_cycle = _shares(weights, CYCLE)  # (sources,) samples of each source in a cycle
        self._cycle = -1
        self._source = np.empty(0, dtype=np.int64)  # (CYCLE,) whose turn it is
        self._rank = np.empty(0, dtype=np.int64)  # (CYCLE,) how often that source came before, in this cycle

    def batch(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        sources, numbers = self.draw(start, count)
        rows = np.empty((count, self.block_size + 1), dtype=np.int64)
        for source in np.unique(sources):
            rows[sources == source] = self.samplers[source].windows(numbers[sources == source])
        return _shifted(rows)

    def draw(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(count,) int64 each: the source of each sample, and its number among that source's samples."""
        assert start >= 0, start
        assert count >= 1, count
        cycles, places = np.divmod(np.arange(start, start + count), CYCLE)
        sources, numbers = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        for cycle in range(int(cycles[0]), int(cycles[-1]) + 1):
            self._enter_cycle(cycle)
            here = cycles == cycle
            sources[here] = self._source[places[here]]
            # All of the source's earlier cycles, and its turns in this one: the count that a stream would have had to remember.
            numbers[here] = cycle * self.per_cycle[sources[here]] + self._rank[places[here]]
        return sources, numbers

    def _enter_cycle(self, cycle: int) -> None:
        if cycle == self._cycle:
            return
        digest = hashlib.sha256(f"{self.seed}:mixture:{cycle}".encode()).digest()
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        self._source = rng.permutation(np.repeat(np.arange(len(self.samplers)), self.per_cycle))
        self._rank = np.empty(CYCLE, dtype=np.int64)
        for source, n_samples in enumerate(self.per_cycle):
            self._rank[self._source == source] = np.arange(n_samples)
        self._cycle = cycle


class ChunkSampler(Sampler):
    """Study arm, not for results: how courses read OpenWebText. A batch comes from one random chunk of the mapped file.

    A chunk holds `rows` windows; a batch of `rows` samples starts anywhere in it, so its windows overlap and some tokens are
    never learnt. With more rows than the file has windows, they are drawn from all of it, as nanoGPT does. Random as it is,
    sample i is still a pure function of (seed, i).
    """

    def __init__(self, tokens: Tokens, block_size: int, seed: int, rows: int) -> None:
        _check_window(tokens, block_size)
        self.tokens, self.block_size, self.rows = tokens, block_size, rows
        self.chunk = min(rows * block_size + 1, len(tokens))
        # Hashed: neighbouring numbers as keys would draw the same places, shifted.
        digest = hashlib.sha256(f"{seed}:random".encode()).digest()
        self._keys = np.frombuffer(digest[:16], dtype="<u8")
        self._windows = _Windows(tokens, block_size + 1)

    def batch(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        return _shifted(self._windows.gather(self.starts(start, count)))

    def starts(self, start: int, count: int) -> np.ndarray:
        """(count,) int64: the position of each sample's first input token."""
        samples = np.arange(start, start + count, dtype=np.uint64)
        chunks = _scramble(samples // np.uint64(self.rows) + self._keys[0]) % np.uint64(len(self.tokens) - self.chunk + 1)
        inside = _scramble(samples + self._keys[1]) % np.uint64(self.chunk - self.block_size)
        return (chunks + inside).astype(np.int64)


class Prefetcher(Sampler):
    """Any sampler, read ahead of the trainer by a thread: while a batch is learnt from, the next ones are copied.

    Requests are guessed to go on as they do; another request is simply served. At most `depth` batches wait.
    """

    def __init__(self, sampler: Sampler, depth: int = 2) -> None:
        assert depth >= 1, depth
        self.sampler, self.depth = sampler, depth
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: deque[tuple[tuple[int, int], Future[tuple[Any, Any]]]] = deque()

    def batch(self, start: int, count: int) -> tuple[Any, Any]:
        # A guess, never an answer of its own: what was not asked for is thrown away, so order and content are the sampler's in
        # any case.
        if not self._ahead or self._ahead[0][0] != (start, count):
            for _, future in self._ahead:
                future.cancel()
            self._ahead.clear()
            self._submit(start, count)
        _, future = self._ahead.popleft()
        following = self._ahead[-1][0][0] + count if self._ahead else start + count
        while len(self._ahead) < self.depth:
            self._submit(following, count)
            following += count
        return future.result()

    def _submit(self, start: int, count: int) -> None:
        # One worker: the samplers' memory of their epoch is never shared between two batches.
        self._ahead.append(((start, count), self._pool.submit(self.sampler.batch, start, count)))


class DeviceTokens:
    """A small corpus wholly on the device: only window positions are made on the CPU, the ids are gathered where they are learnt.

    For the samplers that have `starts`. Raises UserError if the ids need more than `max_bytes` there (4 bytes an id).
    """

    def __init__(self, sampler: BatchSampler | ChunkSampler, device: torch.device | str, max_bytes: int = 1 << 30) -> None:
        import torch

        tokens = sampler.tokens
        if 4 * len(tokens) > max_bytes:
            raise UserError(
                f"{len(tokens)} tokens need {4 * len(tokens)} bytes on the device, more than {max_bytes}; read batches from the shards"
            )
        self.sampler, self.device = sampler, torch.device(device)
        # 4 bytes an id, not the 8 of int64, which only the windows of a batch need; uint16 would be 2, but torch has few
        # operations for it.
        self.ids = torch.from_numpy(np.asarray(tokens[0 : len(tokens)]).astype(np.int32)).to(self.device)
        self._reach = torch.arange(sampler.block_size + 1, device=self.device)

    def batch(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples `start` … `start + count - 1` as (x, y), int64 (count, T) on the device; y is x shifted by one token."""
        import torch

        starts = torch.from_numpy(self.sampler.starts(start, count)).to(self.device, non_blocking=True)
        windows = self.ids[(starts[:, None] + self._reach) % len(self.ids)].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def val_batches(tokens: Tokens, block_size: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Walk (n,) ids once, in order: (x, y), int64 (b, T) each, b ≤ `batch_size`.

    Every token after the first is a target exactly once. The last window is filled up with inputs 0 and targets -1,
    which a loss ignores. The batch size changes nothing but the grouping. Fewer than two tokens give nothing.
    """
    # Windows without overlap: the first token of each has no context but itself. Cheaper than a sliding window by block_size,
    # the same for all models, so a comparison stays fair.
    stride = block_size * batch_size
    for begin in range(0, len(tokens) - 1, stride):
        flat = tokens[begin : begin + stride + 1].astype(np.int64)
        n_targets = len(flat) - 1
        rows = -(-n_targets // block_size)
        x = np.zeros(rows * block_size, dtype=np.int64)
        y = np.full(rows * block_size, -1, dtype=np.int64)
        x[:n_targets], y[:n_targets] = flat[:-1], flat[1:]
        yield x.reshape(rows, block_size), y.reshape(rows, block_size)


def _check_window(tokens: Tokens, block_size: int, name: str = "") -> None:
    if len(tokens) <= block_size:
        raise UserError(
            f"{name + ': ' if name else ''}{len(tokens)} tokens do not fill one window of model.block_size + 1 = "
            f"{block_size + 1}; give more text, or lower model.block_size"
        )


class _Windows:
    """Copies windows of `length` tokens, whole rows at a time where a window lies within one shard."""

    def __init__(self, tokens: Tokens, length: int) -> None:
        self.tokens, self.length = tokens, length
        parts = tokens.parts if isinstance(tokens, TokenView) else [tokens]
        self._ends = np.cumsum([len(part) for part in parts])
        self._windows = [
            np.lib.stride_tricks.sliding_window_view(part, length) if len(part) >= length else None for part in parts
        ]

    def gather(self, starts: np.ndarray) -> np.ndarray:
        """(count, length) ids; the tokens are a circle."""
        # One shard, and no window over its end: numpy copies whole rows, many times faster than token by token.
        if len(self._windows) == 1 and self._windows[0] is not None and starts.max() < len(self._windows[0]):
            return self._windows[0][starts]
        rows = np.empty((len(starts), self.length), dtype=self.tokens.dtype)
        rest = np.ones(len(starts), dtype=bool)
        parts = np.searchsorted(self._ends, starts, side="right")
        for number in np.unique(parts):  # only those needed: a corpus that grew every night has many
            windows = self._windows[number]
            if windows is None:
                continue
            first = starts - (self._ends[number] - len(windows) - self.length + 1)
            inside = (parts == number) & (first < len(windows))
            rows[inside] = windows[first[inside]]
            rest &= ~inside
        if rest.any():  # over the end, or from one shard into the next
            rows[rest] = self.tokens[(starts[rest, None] + np.arange(self.length)) % len(self.tokens)]
        return rows


def _shifted(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B, T + 1) ids → inputs and targets, int64 (B, T) each."""
    return windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)


def _shares(weights: Sequence[float], total: int) -> np.ndarray:
    """Whole numbers in proportion to the weights that add up to `total`, none 0 (largest remainders)."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * (total - len(weights))
    shares = np.floor(exact).astype(np.int64) + 1
    shares[np.argsort(shares - 1 - exact, kind="stable")[: total - shares.sum()]] += 1
    return shares


def _scramble(values: np.ndarray) -> np.ndarray:
    """uint64 → well-mixed uint64 (splitmix64, Steele et al. 2014)."""
    mixed = values * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))

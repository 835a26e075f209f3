"""The order of samples: a pure function, every token once an epoch, no difference between one file and several."""

from __future__ import annotations

import numpy as np
import pytest

from gptcore.batches import BatchSampler, val_batches
from gptcore.config import UserError
from gptcore.shards import TokenView


def numbered(n: int) -> np.ndarray:
    """Ids that are their own positions, so a batch shows where it was read."""
    return np.arange(n, dtype=np.uint16)


def in_parts(tokens: np.ndarray, *cuts: int) -> TokenView:
    return TokenView(np.split(tokens, cuts))


@pytest.mark.parametrize(("n", "block_size"), [(17, 16), (32, 16), (1000, 7), (1001, 64), (4096, 64), (130, 64)])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_targets_every_token_once(n: int, block_size: int, epoch: int) -> None:
    """Guards "once per epoch, but for fewer than block_size": no token twice, few left out, all windows whole."""
    sampler = BatchSampler(numbered(n), block_size, seed=3)
    windows = sampler.windows_per_epoch
    assert windows == n // block_size
    x, y = sampler.batch(epoch * windows, windows)
    assert x.dtype == y.dtype == np.int64
    assert x.shape == y.shape == (windows, block_size)
    assert np.array_equal(y, (x + 1) % n)
    assert np.array_equal(x[:, 1:], y[:, :-1])
    targets, counts = np.unique(y, return_counts=True)
    assert counts.max() == 1
    assert 0 <= n - len(targets) < block_size


def test_left_out_tokens_differ_between_epochs() -> None:
    """Guards the moving offset: with a fixed one the tail would never be learnt."""
    n, block_size = 1000, 64
    sampler = BatchSampler(numbered(n), block_size, seed=0)
    seen = set()
    for epoch in range(8):
        seen |= set(sampler.batch(epoch * sampler.windows_per_epoch, sampler.windows_per_epoch)[1].ravel().tolist())
    assert seen == set(range(n))


def test_a_sample_depends_on_seed_and_number_alone() -> None:
    """Guards the resume, and any number of ranks: however the samples are asked for, sample i is the same."""
    tokens = numbered(777)
    x, y = BatchSampler(tokens, 10, seed=5).batch(0, 300)
    again = BatchSampler(tokens, 10, seed=5)
    for start, count in [(290, 10), (0, 1), (70, 30), (150, 150)]:  # backwards, and over the ends of epochs
        some_x, some_y = again.batch(start, count)
        assert np.array_equal(some_x, x[start : start + count])
        assert np.array_equal(some_y, y[start : start + count])
    assert not np.array_equal(x, BatchSampler(tokens, 10, seed=6).batch(0, 300)[0])
    first, second = x[:77], x[77:154]
    assert not np.array_equal(first, second)


def test_several_shards_give_the_same_batches() -> None:
    """Guards the seams between files, parts shorter than a window and the wrap from last to first among them."""
    tokens = np.random.default_rng(1).integers(0, 60_000, 2000).astype(np.uint16)
    one = BatchSampler(tokens, 32, seed=2)
    many = BatchSampler(in_parts(tokens, 5, 700, 701, 1400, 1990), 32, seed=2)
    for start in range(0, 200, 50):
        for a, b in zip(one.batch(start, 50), many.batch(start, 50), strict=True):
            assert np.array_equal(a, b)


def test_order_is_pinned() -> None:
    """Guards results in the log: a change of the order must be meant. Values of the first implementation."""
    assert BatchSampler(numbered(100), 10, seed=1337).starts(0, 12).tolist() == [
        30,
        0,
        80,
        40,
        60,
        20,
        90,
        70,
        50,
        10,
        67,
        37,
    ]


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.block_size \+ 1 = 11"):
        BatchSampler(numbered(10), 10, seed=0)


@pytest.mark.parametrize("n", [2, 10, 11, 12, 61, 100, 121])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_validation_targets_every_token_after_the_first_once_in_order(n: int, batch_size: int) -> None:
    """Guards the yardstick: the batch size must change nothing, and padding must not count."""
    block_size = 10
    batches = list(val_batches(numbered(n), block_size, batch_size))
    x, y = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    assert x.dtype == y.dtype == np.int64
    assert x.shape == y.shape == (-(-(n - 1) // block_size), block_size)
    assert all(len(batch) <= batch_size for batch, _ in batches)
    assert y[y >= 0].tolist() == list(range(1, n))
    assert np.array_equal(x[y >= 0] + 1, y[y >= 0])
    padded = np.flatnonzero(y.ravel() < 0)
    assert (y.ravel()[padded] == -1).all()
    assert padded.tolist() == list(range(n - 1, y.size))
    for a, b in zip(batches, val_batches(in_parts(numbered(n), 1), block_size, batch_size), strict=True):
        assert np.array_equal(a, b)


def test_validation_without_a_target_is_empty() -> None:
    assert list(val_batches(numbered(1), 10, 4)) == []

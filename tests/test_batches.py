"""The order of samples: a pure function, every token once an epoch, no difference between one file and several."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.batches import CYCLE, BatchSampler, ChunkSampler, DeviceTokens, MixtureSampler, Prefetcher, val_batches
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
    assert BatchSampler(numbered(100), 10, seed=1337).starts(0, 12).tolist() == [30, 0, 80, 40, 60, 20, 90, 70, 50, 10, 67, 37]


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


# --- mixtures -------------------------------------------------------------------------------------------------------------


def mixture(weights: list[float], sizes: list[int], block_size: int = 10, seed: int = 3) -> MixtureSampler:
    """Source k holds the ids 10,000 k, 10,000 k + 1, …, so a batch shows which it came from."""
    samplers = [BatchSampler(numbered(n) + np.uint16(10_000 * k), block_size, seed, stream=k) for k, n in enumerate(sizes)]
    return MixtureSampler(samplers, weights, seed)


@pytest.mark.parametrize("weights", [[3, 1], [0.5, 0.3, 0.2], [1e-9, 1], [1, 1, 1, 1, 1, 1, 1]])
def test_a_cycle_keeps_the_weights(weights: list[float]) -> None:
    """Guards the mixture: shares exact to a sample per cycle, and no source, however light, starved."""
    sampler = mixture(weights, [200] * len(weights))
    for start in (0, CYCLE, 5 * CYCLE):
        sources, _ = sampler.draw(start, CYCLE)
        shares = np.bincount(sources, minlength=len(weights))
        assert shares.sum() == CYCLE
        assert shares.min() >= 1
        assert np.abs(shares - CYCLE * np.array(weights) / sum(weights)).max() <= len(weights)
    early, _ = sampler.draw(0, CYCLE // 16)  # interleaved, not one source after the other
    assert np.abs(np.bincount(early, minlength=len(weights)) - shares / 16).max() < 0.04 * CYCLE


def test_each_source_has_epochs_of_its_own() -> None:
    """Guards "once per source epoch": a small source comes round again and again, a large one does not repeat."""
    sampler = mixture([1, 1], [100, 5000])
    sources, numbers = sampler.draw(0, 900)
    for source in (0, 1):
        assert numbers[sources == source].tolist() == list(range(int((sources == source).sum())))
    _, y = sampler.batch(0, 900)
    assert np.array_equal(y[:, 0] // 10_000, sources)
    small, counts = np.unique(y[sources == 0], return_counts=True)
    assert len(small) == 100
    assert counts.max() - counts.min() <= counts.mean() / 2
    large = y[sources == 1].ravel()
    assert len(np.unique(large)) == min(len(large), len(np.unique(large)))
    assert np.unique(large, return_counts=True)[1].max() == 1


def test_a_sample_of_a_mixture_depends_on_its_number_alone() -> None:
    x, y = mixture([2, 1], [300, 400]).batch(CYCLE - 100, 200)
    again = mixture([2, 1], [300, 400])
    for start, count in [(CYCLE + 50, 20), (CYCLE - 100, 1), (CYCLE - 10, 20)]:
        some_x, some_y = again.batch(start, count)
        at = start - (CYCLE - 100)
        assert np.array_equal(some_x, x[at : at + count])
        assert np.array_equal(some_y, y[at : at + count])
    assert not np.array_equal(x, mixture([2, 1], [300, 400], seed=4).batch(CYCLE - 100, 200)[0])


def test_a_source_too_small_is_named() -> None:
    with pytest.raises(UserError, match=r"poems: 10 tokens do not fill one window"):
        BatchSampler(numbered(10), 10, seed=0, name="poems")


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(11, 500),
    cuts=st.lists(st.integers(0, 500), max_size=6),
    block_size=st.integers(1, 10),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 3),
)
def test_property_an_epoch_is_a_permutation(n: int, cuts: list[int], block_size: int, seed: int, epoch: int) -> None:
    """Guards the order for any length, any files and any seed: each target once, the rest fewer than a window."""
    sampler = BatchSampler(in_parts(numbered(n), *sorted(cuts)), block_size, seed)
    x, y = sampler.batch(epoch * sampler.windows_per_epoch, sampler.windows_per_epoch)
    assert np.array_equal(y, (x + 1) % n)
    assert len(np.unique(y)) == y.size == n // block_size * block_size


# --- the course's way -----------------------------------------------------------------------------------------------------


def test_random_chunks_are_pure_functions_too() -> None:
    """Guards the study arm: all rows of a batch from one stretch of the file, anywhere in it, the same after a resume."""
    n, block_size, rows = 60_000, 16, 8
    sampler = ChunkSampler(numbered(n), block_size, seed=1, rows=rows)
    x, y = sampler.batch(0, 4000)
    assert np.array_equal(y, x + 1)
    assert np.array_equal(ChunkSampler(numbered(n), block_size, seed=1, rows=rows).batch(803, 5)[0], x[803:808])
    starts = x[:, 0].reshape(-1, rows)
    assert (starts.max(1) - starts.min(1)).max() < rows * block_size
    assert starts.min() < 0.02 * n
    assert starts.max() > 0.97 * n
    assert len(np.unique(starts)) < 4000  # with repeats: that is what the arm is there to show
    assert ChunkSampler(numbered(17), 16, seed=1, rows=4).batch(0, 3)[1][:, -1].tolist() == [16] * 3


@pytest.mark.parametrize("rows", [8, 10**6])
def test_neighbouring_seeds_draw_other_places(rows: int) -> None:
    one, other = (ChunkSampler(numbered(60_000), 16, seed=seed, rows=rows).starts(0, 2000) for seed in (1, 2))
    in_common = [
        np.mean(one[max(0, -shift) : 2000 - max(0, shift)] == other[max(0, shift) : 2000 - max(0, -shift)])
        for shift in range(-40, 41)
    ]
    assert max(in_common) < 0.02


# --- ahead of the trainer, on the device, document by document --------------------------------------------------------------


def test_prefetching_changes_nothing() -> None:
    """Guards against a batch too many or too few: also when the trainer jumps back, or changes its micro-batch."""
    plain, ahead = BatchSampler(numbered(777), 10, seed=5), Prefetcher(BatchSampler(numbered(777), 10, seed=5), depth=3)
    for start, count in [(0, 4), (4, 4), (8, 4), (8, 2), (10, 2), (100, 7), (107, 7), (0, 4)]:
        for a, b in zip(plain.batch(start, count), ahead.batch(start, count), strict=True):
            assert np.array_equal(a, b)


def test_prefetching_is_bounded_and_off_the_callers_thread() -> None:
    """Guards memory, and the thread that trains: no more than `depth` batches wait, none is made by the caller."""
    asked: list[int] = []
    threads: set[int] = set()

    class Counting:
        def batch(self, start: int, count: int) -> tuple[int, int]:
            asked.append(start)
            threads.add(threading.get_ident())
            return start, count

    ahead = Prefetcher(Counting(), depth=2)
    assert [ahead.batch(start, 5) for start in (0, 5, 10)] == [(0, 5), (5, 5), (10, 5)]
    time.sleep(0.05)
    assert asked == [0, 5, 10, 15, 20]
    assert threading.get_ident() not in threads


def test_an_error_in_the_thread_reaches_the_trainer() -> None:
    class Broken:
        def batch(self, start: int, count: int) -> tuple[int, int]:
            raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        Prefetcher(Broken()).batch(0, 1)


def test_tokens_on_the_device_give_the_same_batches() -> None:
    tokens = np.random.default_rng(0).integers(0, 60_000, 1000).astype(np.uint16)
    plain = BatchSampler(in_parts(tokens, 300), 16, seed=2)
    there = DeviceTokens(BatchSampler(in_parts(tokens, 300), 16, seed=2), "cpu")
    for start in (0, 50, 61, 200):
        for a, b in zip(plain.batch(start, 12), there.batch(start, 12), strict=True):
            assert b.dtype == torch.int64
            assert np.array_equal(a, b.numpy())
    with pytest.raises(UserError, match="need 4000 bytes on the device"):
        DeviceTokens(plain, "cpu", max_bytes=3999)

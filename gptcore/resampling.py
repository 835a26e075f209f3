"""Clusters of text drawn anew with replacement (the bootstrap), in no more memory for a corpus of millions of documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS_AT_ONCE = 1 << 20  # a chunk's numbers and the values they stand for are 8 MiB each


def resampled_sums(columns: Sequence[np.ndarray], resamples: int, seed: int) -> list[np.ndarray]:
    """For each column (clusters,) its sum over as many clusters drawn anew, `resamples` times: (resamples,).

    A resample draws the same clusters from all columns. The generator is one stream, so the size of a chunk changes nothing.
    """
    rng, clusters = np.random.default_rng(seed), len(columns[0])
    sums = [np.empty(resamples) for _ in columns]
    rows = max(1, DRAWS_AT_ONCE // clusters)
    for start in range(0, resamples, rows):
        draws = rng.integers(0, clusters, (min(rows, resamples - start), clusters))
        for column, total in zip(columns, sums, strict=True):
            total[start : start + rows] = column[draws].sum(1)
    return sums

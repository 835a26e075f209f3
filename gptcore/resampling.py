"""Clusters of text drawn anew with replacement (the bootstrap), in no more memory for a corpus of millions of documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS_AT_ONCE = 1 << 20  # a chunk's numbers and the values they stand for are 8 MiB each
FEWEST_DOCUMENTS = 10  # with fewer, sections are resampled
FEWEST_CLUSTERS = 5  # an interval from fewer would say more about luck than about the model


def choose_clusters(documents: np.ndarray) -> tuple[np.ndarray, str]:
    """What is drawn together: the number of each record's cluster (records,), and what a cluster is.

    documents: (records,) number of each record's document. Whole documents are drawn (sections of one text are alike), or
    sections where fewer than FEWEST_DOCUMENTS documents have any.
    """
    numbers = np.unique(documents, return_inverse=True)[1]
    if numbers.max(initial=-1) + 1 >= FEWEST_DOCUMENTS:
        return numbers, "documents"
    return np.arange(len(documents)), "sections"


def ratio_interval(
    parts: np.ndarray, wholes: np.ndarray, documents: np.ndarray, resamples: int, seed: int
) -> tuple[float, float, str] | None:
    """95 % percentile interval of sum(parts) / sum(wholes), (records,) each, and what was resampled.

    None where too little can be resampled, or `resamples` is 0.
    """
    cluster, unit = choose_clusters(documents)
    columns = [np.bincount(cluster, values) for values in (parts, wholes)]
    if len(columns[0]) < FEWEST_CLUSTERS or not resamples:
        return None
    part, whole = resampled_sums(columns, resamples, seed)
    low, high = np.quantile(part / whole, [0.025, 0.975])
    return float(low), float(high), unit


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

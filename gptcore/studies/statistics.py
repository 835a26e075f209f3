"""Intervals over seeds, and comparisons with seeds paired.

95 % of the mean: from five values on a bootstrap (10,000 resamples of the mean, percentiles widened for small samples as in
Hesterberg 2015), below that Student's t, because a bootstrap cannot leave the range of so few values; none for one value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pandas as pd
from scipy import stats

RESAMPLES = 10_000
FEW = 5  # below so many values: Student's t


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval (nan where n = 1)."""

    mean: float
    low: float
    high: float
    n: int

    def text(self, style: str = ".4g", unit: str = "") -> str:
        """`12 % (n=5, 95 % interval 9 to 15 %)`."""
        unit = f" {unit}" if unit else ""
        if self.n == 1:
            return f"{self.mean:{style}}{unit} (n=1, no interval)"
        return f"{self.mean:{style}}{unit} (n={self.n}, 95 % interval {self.low:{style}} to {self.high:{style}}{unit})"

    def columns(self, name: str) -> dict[str, float]:
        """`name`, `name_low`, `name_high`: how a table holds an interval (gptcore.report.study shows the three as one)."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}


def mean_interval(values: object, level: float = 0.95) -> Interval:
    """Mean of independent values (seeds, repeats) with its interval. All must be finite; at least one."""
    x = np.asarray(values, dtype=np.float64).ravel()
    assert x.size, "an interval of no values"
    assert np.isfinite(x).all(), "an interval of values that were not measured"
    n, mean = x.size, float(x.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    tail = (1 - level) / 2
    t = float(stats.t.ppf(1 - tail, n - 1))
    if n < FEW:
        half = t * float(x.std(ddof=1)) / math.sqrt(n)
        return Interval(mean, mean - half, mean + half, n)
    draws = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    means = x[draws].mean(axis=1)
    widened = NormalDist().cdf(-math.sqrt(n / (n - 1)) * t)
    low, high = np.quantile(means, [widened, 1 - widened])
    return Interval(mean, float(low), float(high), n)


def ratio_interval(values: object, level: float = 0.95) -> Interval:
    """Geometric mean of positive ratios with its interval: `mean_interval` of their logarithms."""
    inner = mean_interval(np.log(np.asarray(values, dtype=np.float64)), level)
    return Interval(math.exp(inner.mean), math.exp(inner.low), math.exp(inner.high), inner.n)


def paired(frame: pd.DataFrame, value: str, baseline: object, *, by: str = "arm", ratio: bool = False) -> pd.DataFrame:
    """Every arm against the baseline on the seeds that both have.

    frame: one row per arm and seed (columns `by`, seed, `value`). Returns one row per other arm: `by`, n, mean (of the arm's
    own values), difference (arm − baseline, or arm ÷ baseline with `ratio`), low, high (95 %), certain (also excludes no
    change when the level is shared among all comparisons, after Bonferroni).
    """
    wide = frame.pivot_table(index="seed", columns=by, values=value, aggfunc="mean", observed=True)
    assert baseline in wide.columns, f"no finished cell of the baseline {baseline!r}"
    others = [arm for arm in dict.fromkeys(frame[by]) if arm != baseline and arm in wide.columns]
    rows = []
    for arm in others:
        both = wide[[baseline, arm]].dropna()
        if both.empty:
            continue
        change = both[arm] / both[baseline] if ratio else both[arm] - both[baseline]
        measure = ratio_interval if ratio else mean_interval
        at_95, shared = measure(change), measure(change, 1 - 0.05 / len(others))
        none = 1.0 if ratio else 0.0
        rows.append(
            {
                by: arm,
                "n": at_95.n,
                "mean": float(both[arm].mean()),
                "difference": at_95.mean,
                "low": at_95.low,
                "high": at_95.high,
                "certain": bool(at_95.n > 1 and (shared.low > none or shared.high < none)),
            }
        )
    return pd.DataFrame(rows, columns=[by, "n", "mean", "difference", "low", "high", "certain"])


def comparison_note(comparisons: pd.DataFrame, baseline: str) -> str:
    """What several comparisons at once mean for the reader."""
    k = len(comparisons)
    if k == 0:
        return f"Nothing was compared with {baseline}."
    lucky = 0.05 * k
    certain = int(comparisons["certain"].sum())
    return (
        f"{k} comparison{'s' if k > 1 else ''} with {baseline}, seeds paired: at 95 % each, about {lucky:.2g} would look like a "
        f"difference by luck alone; {certain} of {k} stay{'s' if certain == 1 else ''} one when the 5 % are shared among all (Bonferroni)."
    )

"""Is the challenger better than the champion? A paired comparison on the same held-out text, and three guards.

Both models have read the same records, so records are resampled in pairs, whole documents at a time (sections of one text
are alike): the paired, clustered bootstrap of Koehn (2004) and Field & Welsh (2007). Pure NumPy, no torch, no files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from gptcore.nights.scores import Scores, pool
from gptcore.nights.settings import NightlySettings
from gptcore.resampling import FEWEST_CLUSTERS, choose_clusters, resampled_sums

SEED = 2024


@dataclass(frozen=True)
class Comparison:
    """Challenger minus champion in bits per byte: below zero is better. No interval where too little can be resampled."""

    champion_bpb: float
    challenger_bpb: float
    low: float | None
    high: float | None
    unit: str
    clusters: int

    @property
    def delta(self) -> float:
        return self.challenger_bpb - self.champion_bpb

    @property
    def percent(self) -> float:
        return 100 * self.delta / self.champion_bpb

    def __str__(self) -> str:
        interval = f", interval {self.low:+.4f} to {self.high:+.4f}" if self.low is not None else ", no interval"
        return (
            f"{self.champion_bpb:.4f} → {self.challenger_bpb:.4f} bits per byte ({self.delta:+.4f}{interval}; "
            f"{self.clusters} {self.unit} resampled)"
        )


@dataclass(frozen=True)
class Decision:
    """`outcome` is promoted, kept or refused; `reason` is one sentence; `groups` are the guarded parts, by name."""

    outcome: str
    reason: str
    comparison: Comparison | None = None
    groups: dict[str, Comparison] = field(default_factory=dict)


def compare(champion: Scores, challenger: Scores, resamples: int, error: float = 0.05) -> Comparison:
    """Both on the same records. `error`: two-sided, so the interval holds 1 - error."""
    assert np.array_equal(champion.bytes, challenger.bytes), "both models read the same records"
    cluster, unit = choose_clusters(champion.documents)
    sums = [np.bincount(cluster, values) for values in (champion.nats, challenger.nats, champion.bytes)]
    low = high = None
    if len(sums[0]) >= FEWEST_CLUSTERS:
        old, new, size = resampled_sums(sums, resamples, SEED)
        low, high = map(float, np.quantile((new - old) / (math.log(2) * size), [error / 2, 1 - error / 2]))
    return Comparison(champion.bpb, challenger.bpb, low, high, unit, len(sums[0]))


def decide(
    frozen: dict[str, tuple[Scores, Scores]],
    tonight: tuple[Scores, Scores] | None,
    sources: list[str],
    recited: tuple[float, float],
    settings: NightlySettings,
    n_arms: int = 1,
) -> Decision:
    """Promote, keep or refuse.

    Args:
        frozen: (champion, challenger) on each earlier night's hold-out, by its name.
        tonight: The same on tonight's, which is guarded but decides nothing: the yardstick must not move with the text.
        sources: Names of the sources, by number.
        recited: Share of training text, and of held-out text, that the challenger recites word for word.
        settings: Thresholds.
        n_arms: The challenger is the best of so many, so the interval is widened (Bonferroni).
    """
    error = 0.05 / n_arms
    old, new = (pool([pair[side] for pair in frozen.values()]) for side in (0, 1))
    overall = compare(old, new, settings.resamples, error)
    everything = frozen | ({"tonight": tonight} if tonight else {})
    groups = {f"hold-out {name}": compare(*pair, settings.resamples, error) for name, pair in everything.items()}
    if len(sources) > 1:
        for number, name in enumerate(sources):
            mask = old.sources == number
            if mask.any():
                groups[f"source {name}"] = compare(old.where(mask), new.where(mask), settings.resamples, error)
    recites = 100 * (recited[0] - recited[1])
    if recites > settings.memorised_percent:
        reason = (
            f"memorisation guard: it recites {100 * recited[0]:.1f} % of the training text and {100 * recited[1]:.1f} % of "
            f"held-out text, more than {settings.memorised_percent:g} points apart"
        )
        return Decision("refused", reason, overall, groups)
    worse = {name: c for name, c in groups.items() if _is_worse(c, settings.guard_percent)}
    if worse:
        name, comparison = max(worse.items(), key=lambda item: item[1].percent)
        reason = f"guard per source: {name} becomes {comparison.percent:.1f} % worse, {comparison}"
        return Decision("refused", reason, overall, groups)
    if overall.high is None:
        return Decision("kept", f"too little held-out text for an interval: {overall}", overall, groups)
    if overall.high >= 0:
        return Decision("kept", f"no certain improvement on the frozen hold-outs: {overall}", overall, groups)
    if -overall.delta < settings.min_effect:
        return Decision("kept", f"better by less than {settings.min_effect:g}: {overall}", overall, groups)
    return Decision("promoted", f"better on the frozen hold-outs: {overall}", overall, groups)


def _is_worse(comparison: Comparison, percent: float) -> bool:
    """Worse by more than allowed, and not by chance."""
    return comparison.percent > percent and (comparison.low is None or comparison.low > 0)

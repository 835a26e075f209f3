"""Numbers as people read them: durations, counts, dashes for what was not measured."""

from __future__ import annotations

import re

from markupsafe import Markup

MISSING = "–"


def number(value: float | None, style: str) -> str:
    """A number in a format such as `,.0f`; a dash where there is none."""
    return MISSING if value is None else format(value, style)


def short_count(value: float | None) -> str:
    """4,096,000 → 4.1 M; a dash for nothing."""
    if value is None:
        return MISSING
    for size, letter in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """A duration as people say it: 0.42 s, 43 s, 5.2 min, 3.1 h."""
    if seconds < 9.95:
        return f"{seconds:.2g} s" if seconds >= 0.005 else "0 s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def keep_together(text: str) -> str:
    """No line break between a number and its unit, nor inside `n = 5`. Markup stays markup."""
    bound = re.sub(r"(?<=\d) (?=(?:%|s|min|h|MiB|[kMB])(?:\W|$))|(?<=\bn) (?== )|(?<=\bn =) ", "\u00a0", text)
    return Markup(bound) if isinstance(text, Markup) else bound

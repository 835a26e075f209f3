"""What every benchmark prints last: one JSON object with its figures, the machine and the command. A module, not a script."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from typing import Any


def figure(
    name: str,
    unit: str,
    ours: Sequence[float],
    *,
    peer: Sequence[float] | None = None,
    goal: float | None = None,
    goal_is: str = "at most",
    of: str = "ours",
    in_turns: bool = False,
    digits: int = 4,
) -> dict[str, Any]:
    """One entry: medians of both sides, their ratio, whether the goal is met.

    goal_is: `at most` or `at least`. of: what the goal is about: `ours` (every run meets it), `median` or `mean` of ours, or `ratio`
    (ours / peer). in_turns: run i of ours belongs to run i of the peer; the ratio is the median of theirs, and so is the spread.
    """
    middle, mean = statistics.median(ours), statistics.fmean(ours)
    other = None if peer is None else statistics.median(peer)
    ratio = None if other is None else middle / other
    spread = [round(min(ours), digits), round(max(ours), digits)]
    if in_turns:
        assert peer is not None
        ratios = [a / b for a, b in zip(ours, peer, strict=True)]
        ratio, spread = statistics.median(ratios), [round(min(ratios), 2), round(max(ratios), 2)]
    judged = {"ours": list(ours), "median": [middle], "mean": [mean], "ratio": [ratio or 0.0]}[of]
    met = None
    if goal is not None:
        met = max(judged) <= goal if goal_is == "at most" else min(judged) >= goal
    return {
        "name": name,
        "unit": unit,
        "ours": round(middle, digits),
        **({"mean": round(mean, digits)} if of == "mean" else {}),
        "peer": None if other is None else round(other, digits),
        "ratio": None if ratio is None else round(ratio, 4),
        "goal": goal,
        "met": met,
        "n": len(ours),
        "spread": spread,
    }


def machine() -> str:
    import torch  # not above: processes whose memory is measured import this module, too

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} cores"
    return f"{name}, Python {platform.python_version()}, torch {torch.__version__}"


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def print_figures(figures: list[dict[str, Any]], **extra: Any) -> None:
    found = {"figures": figures, "machine": machine(), "command": f"python {' '.join(sys.argv)}"}
    print(json.dumps(found | extra), flush=True)

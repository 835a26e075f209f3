"""What is in a corpus: a table of its sources and one of its lengths, with pandas."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gptcore.store import read_manifest

if TYPE_CHECKING:
    import pandas


def summarise(corpus_dir: Path) -> pandas.DataFrame:
    """One row per source: what was read, what the rules left of it, its weight and validation share. From the manifest only."""
    import pandas as pd

    table = pd.DataFrame(read_manifest(corpus_dir)["sources"])
    rules = pd.DataFrame(table.pop("rules").tolist()).fillna(0).astype(int)
    table["duplicates"] = table["read"] - table["documents"]
    table["mean_bytes"] = table["bytes"] / table["documents"].clip(lower=1)
    table["val_share"] = table["val_bytes"] / table["bytes"].clip(lower=1)
    return table.join(rules)


def length_histogram(corpus_dir: Path) -> pandas.DataFrame:
    """Documents by length: columns `from_bytes` (a power of two) and `documents`."""
    import pandas as pd

    counts = read_manifest(corpus_dir)["lengths"]
    used = [power for power, count in enumerate(counts) if count]
    span = range(min(used), max(used) + 1) if used else range(0)
    return pd.DataFrame({"from_bytes": [1 << power for power in span], "documents": [counts[power] for power in span]})

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

    manifest = read_manifest(corpus_dir)
    rows = []
    for source in manifest["sources"]:
        row = {key: value for key, value in source.items() if key != "rules"}
        row["duplicates"] = source["read"] - source["documents"]
        row["mean_bytes"] = source["bytes"] / max(source["documents"], 1)
        row["val_share"] = source["val_bytes"] / max(source["bytes"], 1)
        rows.append(row | source["rules"])
    table = pd.DataFrame(rows)
    rules = sorted({rule for source in manifest["sources"] for rule in source["rules"]})
    table[rules] = table[rules].fillna(0).astype(int)
    return table


def length_histogram(corpus_dir: Path) -> pandas.DataFrame:
    """Documents by length: columns `from_bytes` (a power of two) and `documents`."""
    import pandas as pd

    counts = read_manifest(corpus_dir)["lengths"]
    used = [power for power, count in enumerate(counts) if count]
    span = range(min(used), max(used) + 1) if used else range(0)
    return pd.DataFrame({"from_bytes": [1 << power for power in span], "documents": [counts[power] for power in span]})

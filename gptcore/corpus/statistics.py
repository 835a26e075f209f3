"""What is in a corpus: a table of its documents, and one of its sources, with pandas."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gptcore.corpus.overlap import measure_overlap, sketch_texts
from gptcore.corpus.segments import load_arrays, read_batches
from gptcore.store import read_manifest

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    import pandas


def corpus_statistics(corpus_dir: Path) -> pandas.DataFrame:
    """One row per document: title, bytes, characters, sections, val_bytes, val_share (0 to 1); index: document number.

    Reads no text, but holds a row per document: for a very large corpus take `summarise`.
    """
    import pandas as pd

    columns = ["document", "title", "split", "source", "bytes", "characters"]
    rows = pd.concat([batch.to_pandas() for batch in read_batches(corpus_dir, None, columns)])
    rows = rows.sort_values("document", kind="stable")
    rows["val_bytes"] = rows["bytes"].where(rows["split"] == "val", 0)
    table = rows.groupby("document").agg(
        title=("title", "first"),
        source=("source", "first"),
        bytes=("bytes", "sum"),
        characters=("characters", "sum"),
        sections=("split", "size"),
        val_bytes=("val_bytes", "sum"),
    )
    table["val_share"] = table["val_bytes"] / table["bytes"]
    return table


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


def text_overlap(corpus_dir: Path, texts: Iterable[str], split: str = "train") -> float:
    """Share (0 to 1) of the texts' sampled 48-byte sequences that stand in a split: is a model's sample copied?"""
    mine: np.ndarray = sketch_texts(texts)
    return measure_overlap([mine], load_arrays(corpus_dir, f"ngrams_{split}"))

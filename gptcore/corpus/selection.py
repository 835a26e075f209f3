"""A corpus of some segments of another: last night's text alone, or all but what was refused.

    tonight = select_segments(corpus, ["1f0c…"], home)

Segments are immutable and shared, so a selection costs one manifest. It is named like any corpus with these segments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gptcore.corpus.overlap import measure_overlap
from gptcore.corpus.segments import FORMAT, SPLITS, load_arrays
from gptcore.store import commit_dir, content_id, is_committed, read_manifest

SUMS = ("documents", "bytes", "sections", "near_duplicates")


def select_segments(corpus_dir: Path, names: list[str], home: Path) -> Path:
    """The committed corpus of the segments `names` (at least one, in this order), with the sources and split of `corpus_dir`."""
    assert names, "a corpus has a segment"
    base = read_manifest(corpus_dir)
    folders = [home / "data" / "segments" / name for name in names]
    parts = [read_manifest(folder) for folder in folders]
    weights = [source["weight"] for source in base["sources"]]
    mixture = {"mixture": [weight / sum(weights) for weight in weights]} if len(weights) > 1 else {}
    directory = home / "data" / "corpora" / content_id({"format": FORMAT, "segments": names} | mixture)
    if is_committed(directory):
        return directory
    manifest: dict[str, Any] = {
        **{key: value for key, value in base.items() if key != "files"},
        "id": directory.name,
        "segments": names,
        **{key: sum(part[key] for part in parts) for key in SUMS},
        "splits": {
            split: {key: sum(part["splits"][split][key] for part in parts) for key in parts[0]["splits"][split]}
            for split in SPLITS
        },
        "sources": [
            source | {key: sum(part["sources"][number][key] for part in parts) for key in ("documents", "bytes", "val_bytes")}
            for number, source in enumerate(base["sources"])
        ],
        "lengths": np.sum([part["lengths"] for part in parts], axis=0).tolist(),
        "overlap": round(overlap_of(folders, folders), 6),
    }
    with commit_dir(directory, manifest):
        pass
    return directory


def overlap_of(held_out: list[Path], training: list[Path]) -> float:
    """Share (0 to 1) of the validation text's 48-byte sequences of some segments that stand in the training text of others."""
    val = [rows for folder in held_out for rows in load_arrays(folder, "ngrams_val")]
    train = [rows for folder in training for rows in load_arrays(folder, "ngrams_train")]
    return measure_overlap(val, train)


def byte_entropy(corpus_dir: Path, most_bytes: int = 64 << 20) -> float:
    """Bits per byte of a corpus for someone who knows how often each byte occurs, and nothing of what stands before it.

    A model that does no better has learnt nothing about order. Looks at both splits, the first `most_bytes`.
    """
    from gptcore.corpus.segments import read_batches

    counts = np.zeros(256, dtype=np.int64)
    for batch in read_batches(corpus_dir, None, ["text"]):
        data = b"".join(value.as_py().encode() for value in batch.column(0))
        counts += np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
        if counts.sum() >= most_bytes:
            break
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())

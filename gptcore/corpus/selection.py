"""A corpus of some segments of another: last night's text alone, or all but what was refused.
Segments are immutable and shared, so a selection costs one manifest. It is named like any corpus with these segments.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gptcore.corpus.segments import add_up, corpus_dir_of, overlap_of, read_batches
from gptcore.store import commit_dir, is_committed, read_manifest


def select_segments(corpus_dir: Path, names: list[str], home: Path) -> Path:
    """The committed corpus of the segments `names` (at least one, in this order), with the sources and split of `corpus_dir`."""
    assert names, "a corpus has a segment"
    base = read_manifest(corpus_dir)
    directory = corpus_dir_of(names, [source["weight"] for source in base["sources"]], home)
    if is_committed(directory):
        read_manifest(directory)
        return directory
    folders = [home / "data" / "segments" / name for name in names]
    counts = add_up([read_manifest(folder) for folder in folders])
    sources = [source | held for source, held in zip(base["sources"], counts["sources"], strict=True)]
    manifest = base | counts | {"id": directory.name, "segments": names, "sources": sources}
    manifest["overlap"] = round(overlap_of(folders, folders), 6)
    with commit_dir(directory, manifest):
        pass
    return directory


def byte_entropy(corpus_dir: Path, most_bytes: int = 64 << 20) -> float:
    """Bits per byte of a corpus for someone who knows how often each byte occurs, and nothing of what stands before it.

    A model that does no better has learnt nothing about order. Looks at both splits, the first `most_bytes`.
    """
    counts = np.zeros(256, dtype=np.int64)
    for batch in read_batches(corpus_dir, None, ["text"]):
        data = b"".join(value.as_py().encode() for value in batch.column(0))
        counts += np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
        if counts.sum() >= most_bytes:
            break
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())

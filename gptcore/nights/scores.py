"""What one model makes of one hold-out, record by record: kept, so that no pair is ever measured twice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptcore.store import DamagedError, read_arrays, write_arrays

NAMES = ("nats", "bytes", "documents", "sources")


@dataclass(frozen=True)
class Scores:
    """(records,) each; records are documents or sections of the hold-out."""

    nats: np.ndarray
    bytes: np.ndarray
    documents: np.ndarray  # number of the record's document within the hold-out
    sources: np.ndarray  # number of its source

    @property
    def bpb(self) -> float:
        """Bits per byte over all records."""
        return float(self.nats.sum() / (math.log(2) * self.bytes.sum()))

    def where(self, mask: np.ndarray) -> Scores:
        return Scores(self.nats[mask], self.bytes[mask], self.documents[mask], self.sources[mask])


def score_path(folder: Path, key: str, holdout: str) -> Path:
    """Where the scores of a model (by its run's name) on a hold-out stand."""
    return folder / key.replace("/", "-") / f"{holdout}.npz"


def save_scores(path: Path, scores: Scores) -> None:
    """As .npz with a checksum; `load_scores` reads it."""
    write_arrays(path, {name: getattr(scores, name) for name in NAMES})


def load_scores(path: Path) -> Scores:
    """Raises DamagedError for a file that is not what was written, OSError for one that cannot be read."""
    try:
        arrays = read_arrays(path)
        return Scores(**{name: arrays[name] for name in NAMES})
    except (DamagedError, KeyError):
        raise DamagedError(f"{path}: damaged; delete it, and the next night measures it again") from None


def pool(parts: list[Scores]) -> Scores:
    """Several hold-outs as one; documents of different hold-outs stay different documents."""
    documents, before = [], 0
    for part in parts:
        documents.append(part.documents + before)
        before += int(part.documents.max(initial=-1)) + 1
    return Scores(
        np.concatenate([part.nats for part in parts]),
        np.concatenate([part.bytes for part in parts]),
        np.concatenate(documents),
        np.concatenate([part.sources for part in parts]),
    )

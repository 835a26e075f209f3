"""What one model makes of one hold-out, record by record: kept, so that no pair is ever measured twice."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from gptcore.store import DamagedError


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
    """Through a temporary name; .npz without pickled objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    np.savez(tmp, nats=scores.nats, bytes=scores.bytes, documents=scores.documents, sources=scores.sources)
    tmp.replace(path)


def load_scores(path: Path) -> Scores:
    """Raises DamagedError for a file that cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Scores(**{name: arrays[name] for name in ("nats", "bytes", "documents", "sources")})
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise DamagedError(f"{path}: damaged ({error}); delete it, and the next night measures it again") from None


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

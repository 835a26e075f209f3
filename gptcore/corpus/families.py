"""What a home remembers of a source between two ingests: its corpora, and which files held which documents.

A family is one source with its settings, whatever it holds at the moment: `home/data/families/<id>/`. Each ingest adds a
ledger there, `<number>-<corpus>.npz`: every file's signature (inode, size, times) and the digests of its documents, so that
an untouched file is neither opened nor decompressed again. Ledgers are caches: without them everything is read again, with
the same result.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptcore.config import DataConfig
from gptcore.corpus.segments import FORMAT, segment_dirs
from gptcore.corpus.sources import SourceFile
from gptcore.store import content_id, read_arrays, write_arrays

logger = logging.getLogger(__name__)

# Settings that say how fast or how much, not what: they change no corpus.
INCIDENTAL = {"processes", "order", "dask_address", "timeout_seconds", "max_overlap"} | {
    f"max_{limit}" for limit in ("members", "member_bytes", "total_bytes", "expansion", "download_bytes")
}
RACY_SECONDS = 2.0  # a file written so shortly before it is read may change again within its clock's resolution
KEPT = 20  # corpora of a family with a ledger; an older one than these is not added to
NO_DIGESTS = np.zeros((0, 2), dtype=np.uint64)


@dataclass
class Note:
    """What one file held: the digests of its documents (n, 2), and how often each cleaning rule applied."""

    signature: tuple[int, ...]
    digests: np.ndarray
    rules: dict[str, int]


class CorpusNotes(dict[str, Note]):
    """A note on each file of one corpus, by `file_key`."""

    def note_on(self, file: SourceFile) -> Note | None:
        """The file's note if it is untouched since, else None."""
        note = self.get(file_key(file))
        return note if note is not None and note.signature == file.signature else None


def file_key(file: SourceFile) -> str:
    return f"{file.source}/{file.name}"


class Family:
    """The memory of one source in one home."""

    def __init__(self, data: DataConfig, home: Path) -> None:
        settings = data.model_dump(mode="json", exclude=INCIDENTAL | {"source"})
        sources = [(_whereabouts(source.source), source.text_column) for source in data.sources]
        self.home = home
        self.folder = home / "data" / "families" / content_id({"format": FORMAT, "settings": settings, "sources": sources})

    def newest(self) -> Path | None:
        """The family's newest corpus that is still whole; every byte of it is verified. Raises OSError for one that cannot be read."""
        for ledger in reversed(self._ledgers()):
            directory = self.home / "data" / "corpora" / _corpus_of(ledger)
            try:
                segment_dirs(directory)
            except (ValueError, KeyError) as error:
                if directory.exists():
                    logger.warning("%s; an older corpus, or none, is gone on from", str(error).partition(";")[0])
                continue
            return directory
        return None

    def ledger(self, corpus: Path) -> CorpusNotes:
        """The newest ledger of that corpus; empty if there is none, or it is damaged."""
        path = next((path for path in reversed(self._ledgers()) if _corpus_of(path) == corpus.name), None)
        if path is None:
            return CorpusNotes()
        try:
            arrays = read_arrays(path)
            head = json.loads(arrays["head"].tobytes())
            if head["corpus"] != corpus.name:
                return CorpusNotes()
            ends = np.cumsum(arrays["counts"])
            parts = np.split(arrays["digests"].reshape(-1, 2), ends[:-1]) if len(ends) else []
            signatures = map(tuple, arrays["signatures"].tolist())
            rules = (head["rules"].get(name, {}) for name in head["names"])
            notes = map(Note, signatures, parts, rules)
            return CorpusNotes(dict(zip(head["names"], notes, strict=True)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s: not usable (%s); everything is read again", path, error)
            return CorpusNotes()

    def remember(self, corpus: Path, files: list[SourceFile], notes: list[Note], started: float) -> None:
        """Note that `corpus` is what these files held, file i what `notes[i]` says; `started`: when they were listed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self._ledgers()
        number = 1 + (int(before[-1].name.partition("-")[0]) if before else 0)
        untouched = [file.mtime < started - RACY_SECONDS for file in files]
        signatures = [note.signature if old else (0,) * 5 for note, old in zip(notes, untouched, strict=True)]
        keys = [file_key(file) for file in files]
        rules = {key: note.rules for key, note in zip(keys, notes, strict=True) if note.rules}
        head = json.dumps({"corpus": corpus.name, "names": keys, "rules": rules}).encode()
        arrays: dict[str, np.ndarray] = {
            "head": np.frombuffer(head, dtype=np.uint8),
            "signatures": np.array(signatures, dtype=np.int64).reshape(-1, 5),
            "counts": np.array([len(note.digests) for note in notes], dtype=np.int64),
            "digests": np.concatenate([NO_DIGESTS, *(note.digests for note in notes)]),
        }
        write_arrays(self.folder / f"{number:06d}-{corpus.name}.npz", arrays)
        others = [ledger for ledger in before if _corpus_of(ledger) != corpus.name]
        for old in set(before) - set(others[1 - KEPT :]):  # an older look at the same corpus is never read again
            old.unlink(missing_ok=True)

    def _ledgers(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("[0-9]*-*.npz"))


def _corpus_of(ledger: Path) -> str:
    return ledger.stem.partition("-")[2]


def _whereabouts(source: str) -> Any:
    """A path as an absolute one, so that the same source is found from another working directory."""
    return source if "://" in source or source.startswith("package:") else str(Path(source).expanduser().absolute())

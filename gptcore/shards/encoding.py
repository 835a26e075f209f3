"""One segment of the corpus becomes one directory of ids, chunk by chunk, on as many processes or machines as there are.

    home/data/tokens/<id>/{train_000000.bin …, val_000000.bin …, train_index.npy, val_index.npy, manifest.json}

The id is that of the segment, the vocabulary and the format, so a grown corpus encodes its new segment only. Workers leave
the ids of a chunk in files beside; this process strings them together in order, so the bytes never depend on who worked.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gptcore import corpus, vocab
from gptcore.corpus.chunks import Chunk, list_chunks, read_chunk
from gptcore.parallel import ChunkMap, progress_bar
from gptcore.shards.format import ShardWriter, check_range, token_dtype
from gptcore.store import DamagedError, commit_dir, content_id, hash_file, is_committed, read_manifest, verified

logger = logging.getLogger(__name__)

FORMAT = 2
INDEX_COLUMNS = 4  # first token, document number, bytes of text, source number


@dataclass(frozen=True)
class EncodeJob:
    """A chunk, the vocabulary's directory, and where the ids go."""

    chunk: Chunk
    number: int
    vocab_dir: str
    out: str


@dataclass(frozen=True)
class Part:
    """An encoded chunk: its file of ids, and its rows of the index (token numbers from 0)."""

    path: str
    index: np.ndarray
    n_unknown: int
    sha256: str  # of the file, which another machine may have written


def locate_tokens(segment: Path, vocabulary: vocab.Vocab, home: Path) -> Path:
    """The directory of a segment's ids in a vocabulary, committed yet or not."""
    key = {"format": FORMAT, "segment": segment.name, "vocab": vocabulary.fingerprint}
    return home / "data" / "tokens" / content_id(key)


def write_tokens(segment: Path, vocab_dir: Path, home: Path, chunk_map: ChunkMap) -> Path:
    """Encode a segment into a committed directory; return it. Early return when it is there. Raises DamagedError when that is damaged."""
    vocabulary = load_vocab(str(vocab_dir))
    directory = locate_tokens(segment, vocabulary, home)
    if is_committed(directory):
        verified(directory)
        return directory
    vocabulary.require_engine()
    manifest: dict[str, Any] = {"kind": "tokens", "id": directory.name, "format": FORMAT, "segment": segment.name}
    manifest |= {"fingerprint": vocabulary.fingerprint, "vocab_size": vocabulary.size}
    manifest["documents"] = read_manifest(segment)["documents"]
    chunks = list_chunks(segment)
    start = time.perf_counter()
    with commit_dir(directory, manifest) as tmp:
        jobs = [EncodeJob(chunk, number, str(vocab_dir), str(tmp)) for number, chunk in enumerate(chunks)]
        splits = {split: _SplitWriter(tmp, split, vocabulary) for split in corpus.SPLITS}
        try:
            with progress_bar(f"encoding {segment.name}", sum(chunk.bytes for chunk in chunks)) as progress:
                for job, part in zip(jobs, chunk_map(encode_chunk, jobs), strict=True):
                    splits[job.chunk.split].append(part)
                    progress.update(job.chunk.bytes)
        finally:
            for writer in splits.values():
                writer.shards.close()
        facts = {split: writer.finish() for split, writer in splits.items()}
        for key in ("n_tokens", "n_bytes", "n_unknown", "n_records", "shards"):
            manifest[key] = {split: facts[split][key] for split in corpus.SPLITS}
    seconds, n_bytes = time.perf_counter() - start, sum(manifest["n_bytes"].values())
    logger.info("tokens %s: %.1f MB of text at %.0f MB/s", directory.name, n_bytes / 1e6, n_bytes / 1e6 / seconds)
    return directory


def encode_chunk(job: EncodeJob) -> Part:
    """Encode a chunk into a file of ids below `job.out`; runs in any process that sees the same files."""
    vocabulary = load_vocab(job.vocab_dir)
    vocabulary.require_engine()
    path = Path(job.out) / f"part_{job.number:06d}"
    rows: list[np.ndarray] = [np.empty((0, INDEX_COLUMNS), dtype=np.int64)]
    n_tokens = n_unknown = 0
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for some in read_chunk(job.chunk):
            ids, offsets = vocabulary.encode_batch(some.texts)
            check_range(ids, vocabulary.size)
            starts = n_tokens + offsets[:-1] + np.arange(len(some.texts))
            rows.append(np.stack([starts, some.documents, some.bytes, some.sources], axis=1))
            whole = _behind_ends(ids, offsets, vocabulary.eot_id, token_dtype(vocabulary.size))
            file.write(whole.data)
            digest.update(whole.data)
            n_tokens += len(whole)
            n_unknown += vocabulary.count_unknown(ids)
    return Part(str(path), np.concatenate(rows), n_unknown, digest.hexdigest())


@lru_cache(maxsize=2)
def load_vocab(directory: str) -> vocab.Vocab:
    """A vocabulary, once per process: a worker encodes many chunks with it."""
    return vocab.Vocab.load(directory)


class _SplitWriter:
    """The shards and the index of one split, fed with parts in order."""

    def __init__(self, directory: Path, split: str, vocabulary: vocab.Vocab) -> None:
        self.directory, self.split = directory, split
        self.shards = ShardWriter(directory, split, vocabulary.size, vocabulary.fingerprint)
        self._rows: list[np.ndarray] = []
        self._n_unknown = 0

    def append(self, part: Part) -> None:
        part.index[:, 0] += self.shards.n_tokens
        self._rows.append(part.index)
        self._n_unknown += part.n_unknown
        if hash_file(Path(part.path)) != part.sha256:
            raise DamagedError(f"{part.path}: not the ids that were written; look at the disk, and run again")
        with open(part.path, "rb") as file:
            self.shards.append_raw(file)
        Path(part.path).unlink()

    def finish(self) -> dict[str, Any]:
        index = np.concatenate([np.empty((0, INDEX_COLUMNS), dtype=np.int64), *self._rows])
        np.save(self.directory / f"{self.split}_index.npy", index, allow_pickle=False)
        return {
            "n_tokens": self.shards.n_tokens,
            "n_bytes": int(index[:, 2].sum()),
            "n_unknown": self._n_unknown,
            "n_records": len(index),
            "shards": self.shards.names,
        }


def _behind_ends(ids: np.ndarray, offsets: np.ndarray, eot_id: int, dtype: str) -> np.ndarray:
    """The ids of all records, `<|endoftext|>` before each; `offsets` (records + 1,) are where they begin and end in `ids`."""
    n_records = len(offsets) - 1
    starts = offsets[:-1] + np.arange(n_records)  # where the ends of text go
    result = np.empty(len(ids) + n_records, dtype=dtype)
    if len(ids) > 64 * n_records:  # whole records at a time, several times faster unless they are tiny
        for start, begin, end in zip(starts.tolist(), offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            result[start + 1 : start + 1 + end - begin] = ids[begin:end]
    else:
        is_text = np.ones(len(result), dtype=bool)
        is_text[starts] = False
        result[is_text] = ids
    result[starts] = eot_id
    return result

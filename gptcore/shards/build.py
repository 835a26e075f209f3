"""A corpus in a vocabulary, as a committed shard directory: encode what is not yet encoded, string it together."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptcore import corpus, vocab
from gptcore.config import ExperimentConfig, UserError
from gptcore.parallel import ChunkMap, map_processes
from gptcore.shards.encoding import write_tokens
from gptcore.shards.shard_set import FORMAT, ShardSet, require_window
from gptcore.store import commit_dir, content_id, hash_file, is_committed, read_manifest, verified

logger = logging.getLogger(__name__)

COUNTS = ("n_tokens", "n_bytes", "n_unknown", "n_records")
UNKNOWN_ALARM = 0.1  # percent of unknown ids from which a warning is due


@dataclass(frozen=True)
class Prepared:
    """Three committed directories: what a training run reads, and what that was made from."""

    corpus: Path
    vocab: Path
    shards: Path


def locate_shards(corpus_dir: Path, vocab_dir: Path, home: Path) -> Path:
    """The directory of this corpus in this vocabulary, committed yet or not."""
    name = content_id({"format": FORMAT, "corpus": corpus_dir.name, "vocab": vocab_dir.name})
    return home / "data" / "shards" / name


def is_complete(directory: Path) -> bool:
    """Is this shard set committed, and every directory of ids it strings together?"""
    if not is_committed(directory):
        return False
    return all(is_committed(directory / part["directory"]) for part in read_manifest(directory)["tokens"])


def write_shards(corpus_dir: Path, vocab_dir: Path, home: Path, block_size: int, chunk_map: ChunkMap = map_processes) -> Path:
    """Encode what is not yet encoded of a corpus, and string it together in a committed directory; return that.

    Early return when all of it is there. Raises DamagedError when something of it is damaged, SplitTooSmall if a split has fewer than `block_size` + 1 tokens: not one
    window. For characters, and for bytes too few, before anything is written.
    """
    sizes = read_manifest(corpus_dir)["splits"]
    vocabulary = vocab.Vocab.load(vocab_dir)
    # One id per character; at most one per byte in any other vocabulary; and one before each record.
    unit = "characters" if vocabulary.kind == "char" else "bytes"
    require_window({split: sizes[split][unit] + sizes[split]["sections"] for split in corpus.SPLITS}, block_size)
    directory = locate_shards(corpus_dir, vocab_dir, home)
    if is_complete(directory):
        logger.info("shards %s: reused", directory.name)
        return open_whole(directory, block_size).directory
    parts = [write_tokens(segment, vocab_dir, home, chunk_map) for segment in corpus.segment_dirs(corpus_dir)]
    if is_committed(directory):  # some of its parts had been deleted
        return directory
    manifest = _describe(directory, corpus_dir, vocab_dir, vocabulary, parts)
    require_window(manifest["n_tokens"], block_size)
    _report_unknown(manifest, read_manifest(vocab_dir).get("vocab", {}))
    with commit_dir(directory, manifest) as tmp:
        np.save(tmp / "token_bytes.npy", vocabulary.token_bytes, allow_pickle=False)
        shutil.copyfile(vocab_dir / vocab.FILE_NAME, tmp / vocab.FILE_NAME)
    return directory


def open_whole(directory: Path, block_size: int) -> ShardSet:
    """A shard set that is there, every file of it verified. Raises what `write_shards` raises."""
    shard_set = ShardSet.open(directory)
    shard_set.check_fits(block_size)
    for part in shard_set.token_dirs:
        verified(part)
    return shard_set


def prepare(config: ExperimentConfig, home: Path) -> Prepared:
    """Corpus, vocabulary and shards of an experiment, each built or reused.

    Raises UserError for a bad source, or a text too short for the model's context.
    """
    corpus_dir = corpus.build_corpus(config.data, home)
    vocab_dir = vocab.build_vocab(config.vocab, corpus_dir, home)
    return Prepared(corpus_dir, vocab_dir, write_shards(corpus_dir, vocab_dir, home, config.model.block_size))


def _describe(directory: Path, corpus_dir: Path, vocab_dir: Path, vocabulary: vocab.Vocab, parts: list[Path]) -> dict[str, Any]:
    manifests = [read_manifest(part) for part in parts]
    places = [Path(os.path.relpath(part, directory)).as_posix() for part in parts]
    hashes = [hash_file(part / "manifest.json") for part in parts]
    manifest: dict[str, Any] = {"kind": "shards", "id": directory.name, "format": FORMAT}
    manifest |= {"corpus": corpus_dir.name, "vocab": vocab_dir.name, "vocab_kind": vocabulary.kind}
    manifest |= {"vocab_size": vocabulary.size, "eot_id": vocabulary.eot_id, "engine": vocabulary.engine}
    manifest["fingerprint"] = vocabulary.fingerprint
    manifest["tokens"] = [{"directory": p, "manifest_sha256": h} for p, h in zip(places, hashes, strict=True)]
    manifest["sources"] = _weights(read_manifest(corpus_dir))
    return manifest | {key: {split: sum(m[key][split] for m in manifests) for split in corpus.SPLITS} for key in COUNTS}


def _weights(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Name and share of each source of a weighted corpus; empty for one source."""
    sources = manifest["sources"]
    if len(sources) < 2:
        return []
    total = sum(source["weight"] for source in sources)
    return [{"name": source["source"], "weight": source["weight"] / total} for source in sources]


def _report_unknown(manifest: dict[str, Any], settings: dict[str, Any]) -> None:
    for split in corpus.SPLITS:
        n_unknown, n_tokens = manifest["n_unknown"][split], manifest["n_tokens"][split]
        percent = 100 * n_unknown / max(n_tokens, 1)
        level = logging.WARNING if percent > UNKNOWN_ALARM else logging.INFO
        name = manifest["id"]
        logger.log(level, "shards %s: %d %s tokens, %d unknown (%.3g %%)", name, n_tokens, split, n_unknown, percent)
        if n_unknown and settings.get("unknown") == "error":
            raise UserError(
                f"vocab.unknown=error: {n_unknown} tokens of the {split} split are unknown to the vocabulary; use "
                "vocab.unknown=replace, vocab.kind=byte, or learn the vocabulary from this text"
            )

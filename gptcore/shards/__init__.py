"""Room 3, shards: token ids on disk, memory-mapped, in files that describe themselves.

A shard is llm.c's format (`gptcore.shards.format`). Before each record stands `<|endoftext|>`, which counts zero bytes. Every
segment of the corpus has a directory of ids of its own (`gptcore.shards.encoding`); `home/data/shards/<id>/` strings them
together for one vocabulary:

    manifest.json                      the ordered list of those directories, as relative paths, and the totals
    token_bytes.npy, tokenizer.json    bytes per id (V,); the vocabulary

Writing reads Parquet (pyarrow); opening needs NumPy only.
"""

from __future__ import annotations

import json
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
from gptcore.shards.encoding import FORMAT as TOKENS_FORMAT
from gptcore.shards.encoding import write_tokens
from gptcore.shards.format import REMAKE, ShardWriter, TokenView, map_shard
from gptcore.store import commit_dir, content_id, hash_file, is_committed, read_manifest

__all__ = ["Prepared", "ShardSet", "ShardWriter", "Source", "SplitTooSmall", "TokenView"]
__all__ += ["is_complete", "locate_shards", "map_shard", "prepare", "write_shards"]

logger = logging.getLogger(__name__)

FORMAT = 2
COUNTS = ("n_tokens", "n_bytes", "n_unknown", "n_records")
UNKNOWN_ALARM = 0.001  # share of unknown ids from which a warning is due


class SplitTooSmall(UserError):
    """A split holds less than one window of the model's context."""


@dataclass(frozen=True)
class Prepared:
    """Three committed directories: what a training run reads, and what that was made from."""

    corpus: Path
    vocab: Path
    shards: Path


@dataclass(frozen=True)
class Source:
    """The training ids of one source of a weighted corpus. `weight` is its share of the samples."""

    name: str
    weight: float
    tokens: np.ndarray | TokenView


class ShardSet:
    """A committed shard directory, opened read-only. Make one with `ShardSet.open`."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.id: str = manifest["id"]
        self.vocab_size: int = manifest["vocab_size"]
        self.eot_id: int = manifest["eot_id"]
        self.fingerprint: str = manifest["fingerprint"]
        self.n_tokens: dict[str, int] = manifest["n_tokens"]
        self.n_bytes: dict[str, int] = manifest["n_bytes"]
        self.token_bytes: np.ndarray = np.load(directory / "token_bytes.npy", allow_pickle=False)  # (V,)
        self.token_dirs = [directory / part["directory"] for part in manifest["tokens"]]
        self._segments = [self._check_segment(part) for part in manifest["tokens"]]
        self._tokens = {split: self._map_split(split) for split in corpus.SPLITS}

    @classmethod
    def open(cls, directory: str | Path) -> ShardSet:
        """Check the manifests against the files' sizes and every header against its manifest; map, do not read, the ids.

        Raises UserError naming the file that is missing, cut short, of another version or of another vocabulary.
        """
        directory = Path(directory)
        try:
            manifest = read_manifest(directory)
            if manifest.get("kind") != "shards":
                raise UserError(f"{directory}: holds {manifest.get('kind')!r}, not shards; give a directory below data/shards")
            if manifest["format"] != FORMAT:
                raise UserError(f"{directory}: format {manifest['format']}, this version reads {FORMAT}; {REMAKE}")
            return cls(directory, manifest)
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{directory / 'manifest.json'}: damaged; {REMAKE}") from None

    def tokens(self, split: str) -> np.ndarray | TokenView:
        """All ids of a split, (n,) uint16 or uint32: a read-only memory map, or a view over several."""
        return self._tokens[split]

    def index(self, split: str) -> np.ndarray:
        """(records, 4) int64: first token (the record's `<|endoftext|>`), document number, bytes of text, source number."""
        rows = []
        token, document = 0, 0
        for directory, segment in zip(self.token_dirs, self._segments, strict=True):
            part = np.load(directory / f"{split}_index.npy", allow_pickle=False)
            rows.append(part + np.array([token, document, 0, 0]))
            token += segment["n_tokens"][split]
            document += segment["documents"]
        return np.concatenate(rows)

    def sources(self) -> list[Source]:
        """The training ids by source, where the corpus gives its sources weights; else all of them as one."""
        weights = self.manifest["sources"]
        view = self.tokens("train")
        if not weights:
            return [Source("all", 1.0, view)]
        if not isinstance(view, TokenView):
            view = TokenView([view])
        index = self.index("train")
        changes = np.flatnonzero(np.diff(index[:, 3], prepend=-1))  # first record of each run of one source
        begins = index[changes, 0]
        ends = np.append(begins[1:], len(view))
        parts: list[list[np.ndarray]] = [[] for _ in weights]
        for number, begin, end in zip(index[changes, 3], begins, ends, strict=True):
            parts[number] += view.cut(int(begin), int(end))
        empty = np.empty(0, dtype=view.dtype)
        return [
            Source(weight["name"], weight["weight"], TokenView(pieces or [empty]))
            for weight, pieces in zip(weights, parts, strict=True)
        ]

    def check_fits(self, block_size: int) -> None:
        """Raises UserError if a split does not hold one window of `block_size` + 1 tokens."""
        _require_window(self.n_tokens, block_size)

    def verify(self) -> int:
        """Read everything: every file's sha256, every id's range, every record's place. The bytes read.

        Raises UserError naming the file that is not what was written.
        """
        n_bytes = 0
        for directory in (self.directory, *self.token_dirs):
            n_bytes += sum(facts["bytes"] for facts in read_manifest(directory, verify=True)["files"].values())
        for split in corpus.SPLITS:
            starts, tokens = self.index(split)[:, 0], self.tokens(split)
            ends = 0
            for part in tokens.parts if isinstance(tokens, TokenView) else [tokens]:
                if len(part) and int(part.max()) >= self.vocab_size:
                    raise UserError(f"{self.directory}: an id of its {split} tokens is no id of its vocabulary; {REMAKE}")
                ends += int(np.count_nonzero(part == self.eot_id))
            if ends != len(starts) or (len(starts) and (tokens[starts] != self.eot_id).any()):
                raise UserError(f"{self.directory}: its {split} records are not where its index says; {REMAKE}")
        return n_bytes

    def _check_segment(self, part: dict[str, Any]) -> dict[str, Any]:
        directory = self.directory / part["directory"]
        manifest = read_manifest(directory)
        if manifest["kind"] != "tokens" or manifest["format"] != TOKENS_FORMAT:
            raise UserError(
                f"{directory}: {manifest['kind']!r} of format {manifest['format']}, this version reads 'tokens' of "
                f"format {TOKENS_FORMAT}; {REMAKE}"
            )
        if hash_file(directory / "manifest.json") != part["manifest_sha256"]:
            raise UserError(f"{directory / 'manifest.json'}: not the one {self.directory} was made with; {REMAKE}")
        return manifest

    def _map_split(self, split: str) -> np.ndarray | TokenView:
        parts: list[np.ndarray] = [
            map_shard(directory / name, self.fingerprint)
            for directory, segment in zip(self.token_dirs, self._segments, strict=True)
            for name in segment["shards"][split]
        ]
        found = sum(len(part) for part in parts)
        if found != self.n_tokens[split]:
            raise UserError(
                f"{self.directory}: {found} {split} tokens in its shards, {self.n_tokens[split]} in its manifest; {REMAKE}"
            )
        return parts[0] if len(parts) == 1 else TokenView(parts or [np.empty(0, dtype="<u2")])


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

    Early return when all of it is there. Raises SplitTooSmall if a split has fewer than `block_size` + 1 tokens: not one
    window. For characters, and for bytes too few, before anything is written.
    """
    sizes = read_manifest(corpus_dir)["splits"]
    vocabulary = vocab.Vocab.load(vocab_dir)
    # One id per character; at most one per byte in any other vocabulary; and one before each record.
    unit = "characters" if vocabulary.kind == "char" else "bytes"
    _require_window({split: sizes[split][unit] + sizes[split]["sections"] for split in corpus.SPLITS}, block_size)
    directory = locate_shards(corpus_dir, vocab_dir, home)
    if is_complete(directory):
        logger.info("shards %s: reused", directory.name)
        ShardSet.open(directory).check_fits(block_size)
        return directory
    parts = [write_tokens(segment, vocab_dir, home, chunk_map) for segment in corpus.segment_dirs(corpus_dir)]
    if is_committed(directory):  # some of its parts had been deleted
        return directory
    manifest = _describe(directory, corpus_dir, vocab_dir, vocabulary, parts)
    _require_window(manifest["n_tokens"], block_size)
    _report_unknown(manifest, read_manifest(vocab_dir).get("vocab", {}))
    with commit_dir(directory, manifest) as tmp:
        np.save(tmp / "token_bytes.npy", vocabulary.token_bytes, allow_pickle=False)
        shutil.copyfile(vocab_dir / vocab.FILE_NAME, tmp / vocab.FILE_NAME)
    return directory


def prepare(config: ExperimentConfig, home: Path) -> Prepared:
    """Corpus, vocabulary and shards of an experiment, each built or reused.

    Raises UserError for a bad source, or a text too short for the model's context.
    """
    corpus_dir = corpus.build_corpus(config.data, home)
    vocab_dir = vocab.build_vocab(config.vocab, corpus_dir, home)
    return Prepared(corpus_dir, vocab_dir, write_shards(corpus_dir, vocab_dir, home, config.model.block_size))


def _describe(directory: Path, corpus_dir: Path, vocab_dir: Path, vocabulary: vocab.Vocab, parts: list[Path]) -> dict[str, Any]:
    manifests = [read_manifest(part) for part in parts]
    return {
        "kind": "shards",
        "id": directory.name,
        "format": FORMAT,
        "corpus": corpus_dir.name,
        "vocab": vocab_dir.name,
        "vocab_kind": vocabulary.kind,
        "vocab_size": vocabulary.size,
        "eot_id": vocabulary.eot_id,
        "engine": vocabulary.engine,
        "fingerprint": vocabulary.fingerprint,
        "tokens": [
            {
                "directory": Path(os.path.relpath(part, directory)).as_posix(),
                "manifest_sha256": hash_file(part / "manifest.json"),
            }
            for part in parts
        ],
        "sources": _weights(read_manifest(corpus_dir)),
        **{key: {split: sum(m[key][split] for m in manifests) for split in corpus.SPLITS} for key in COUNTS},
    }


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
        share = n_unknown / max(n_tokens, 1)
        level = logging.WARNING if share > UNKNOWN_ALARM else logging.INFO
        logger.log(
            level, "shards %s: %d %s tokens, %d unknown (%.3g %%)", manifest["id"], n_tokens, split, n_unknown, 100 * share
        )
        if n_unknown and settings.get("unknown") == "error":
            raise UserError(
                f"vocab.unknown=error: {n_unknown} tokens of the {split} split are unknown to the vocabulary; use "
                "vocab.unknown=replace, vocab.kind=byte, or learn the vocabulary from this text"
            )


def _require_window(n_tokens: dict[str, int], block_size: int) -> None:
    for split, count in n_tokens.items():
        if count < block_size + 1:
            way_out = "raise data.val_fraction" if split == "val" else "lower data.val_fraction"
            raise SplitTooSmall(
                f"the {split} split has {count} tokens, fewer than model.block_size + 1 = {block_size + 1}: "
                f"give more text with data.source, lower model.block_size, or {way_out}"
            )

"""A committed shard directory, opened: ids mapped and not read, and verified before they are handed out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptcore import corpus
from gptcore.config import UserError
from gptcore.shards.encoding import FORMAT as TOKENS_FORMAT
from gptcore.shards.format import REMAKE, TokenView, map_shard
from gptcore.shards.verification import Verification
from gptcore.store import hash_file, read_manifest, verified

FORMAT = 2
SMALL_BYTES = 64 << 20  # training ids that are verified before they are used, in a twentieth of a second


class SplitTooSmall(UserError):
    """A split holds less than one window of the model's context."""


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
        self.token_dirs = [(directory / part["directory"]).resolve() for part in manifest["tokens"]]
        self._segments = [self._check_segment(*pair) for pair in zip(self.token_dirs, manifest["tokens"], strict=True)]
        self._tokens = {split: self._map_split(split) for split in corpus.SPLITS}
        self.verification = Verification()  # of training ids, while `verified_behind` lasts
        self._verified: set[str] = set()  # splits that are, or will be before anything is saved

    @classmethod
    def open(cls, directory: str | Path) -> ShardSet:
        """Check the manifests against the files' sizes and every header against its manifest; map, do not read, the ids.

        Ids and index are verified when they are asked for, the rest now. Raises UserError naming the file that is missing, damaged, cut
        short, of another version or of another vocabulary.
        """
        directory = Path(directory)
        try:
            manifest = verified(directory)
            if manifest.get("kind") != "shards":
                raise UserError(f"{directory}: holds {manifest.get('kind')!r}, not shards; give a directory below data/shards")
            if manifest["format"] != FORMAT:
                raise UserError(f"{directory}: format {manifest['format']}, this version reads {FORMAT}; {REMAKE}")
            return cls(directory, manifest)
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{directory / 'manifest.json'}: damaged; {REMAKE}") from None

    def tokens(self, split: str) -> np.ndarray | TokenView:
        """All ids of a split, (n,) uint16 or uint32: a read-only memory map, or a view over several.

        Raises DamagedError naming the file that is not what was written.
        """
        if split not in self._verified:
            for directory, segment in zip(self.token_dirs, self._segments, strict=True):
                verified(directory, segment["shards"][split])
            self._verified.add(split)
        return self._tokens[split]

    def index(self, split: str) -> np.ndarray:
        """(records, 4) int64: first token (the record's `<|endoftext|>`), document number, bytes of text, source number.

        Raises DamagedError naming the file that is not what was written.
        """
        rows = []
        token, document = 0, 0
        for directory, segment in zip(self.token_dirs, self._segments, strict=True):
            verified(directory, [f"{split}_index.npy"])
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

    @contextmanager
    def verified_behind(self) -> Iterator[Verification]:
        """Inside, many training ids are handed out at once, while they are still being verified: see `Verification`."""
        files = self._files("train")
        is_small = sum(directory.joinpath(name).stat().st_size for directory, name in files) <= SMALL_BYTES
        self.verification = Verification([] if is_small else files)
        if not is_small:
            self._verified.add("train")
        try:
            yield self.verification
        finally:
            self.verification.close()
            self._verified.discard("train")

    def check_fits(self, block_size: int) -> None:
        """Raises UserError if a split does not hold one window of `block_size` + 1 tokens."""
        require_window(self.n_tokens, block_size)

    def verify(self) -> int:
        """Read everything: every file's sha256, every id's range, every record's place. The bytes read.

        Raises UserError naming the file that is not what was written.
        """
        n_bytes = 0
        for directory in (self.directory, *self.token_dirs):
            n_bytes += sum(facts["bytes"] for facts in verified(directory)["files"].values())
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

    def _check_segment(self, directory: Path, part: dict[str, Any]) -> dict[str, Any]:
        manifest = read_manifest(directory)
        if manifest["kind"] != "tokens" or manifest["format"] != TOKENS_FORMAT:
            raise UserError(
                f"{directory}: {manifest['kind']!r} of format {manifest['format']}, this version reads 'tokens' of "
                f"format {TOKENS_FORMAT}; {REMAKE}"
            )
        if hash_file(directory / "manifest.json") != part["manifest_sha256"]:
            raise UserError(f"{directory / 'manifest.json'}: not the one {self.directory} was made with; {REMAKE}")
        return manifest

    def _files(self, split: str) -> list[tuple[Path, str]]:
        """The files of a split's ids, in order."""
        found = zip(self.token_dirs, self._segments, strict=True)
        return [(directory, name) for directory, segment in found for name in segment["shards"][split]]

    def _map_split(self, split: str) -> np.ndarray | TokenView:
        parts: list[np.ndarray] = [map_shard(directory / name, self.fingerprint) for directory, name in self._files(split)]
        found = sum(len(part) for part in parts)
        if found != self.n_tokens[split]:
            raise UserError(
                f"{self.directory}: {found} {split} tokens in its shards, {self.n_tokens[split]} in its manifest; {REMAKE}"
            )
        return parts[0] if len(parts) == 1 else TokenView(parts or [np.empty(0, dtype="<u2")])


def require_window(n_tokens: dict[str, int], block_size: int) -> None:
    """Raises SplitTooSmall if a split does not hold one window of `block_size` + 1 tokens."""
    for split, count in n_tokens.items():
        if count < block_size + 1:
            way_out = "raise data.val_fraction" if split == "val" else "lower data.val_fraction"
            raise SplitTooSmall(
                f"the {split} split has {count} tokens, fewer than model.block_size + 1 = {block_size + 1}: "
                f"give more text with data.source, lower model.block_size, or {way_out}"
            )

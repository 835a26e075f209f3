"""`gptloom data stats|verify|head EXPERIMENT|DIR`: what prepared data holds, without Prefect and without changing anything.

DIR is a corpus, segment, vocabulary, tokens or shards directory; for an experiment file the three directories it leads to.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gptcore import corpus, shards, vocab
from gptcore.config import UserError, load_config
from gptcore.store import home_dir, is_committed, read_manifest, verified

HEAD_RECORDS, HEAD_TOKENS, HEAD_CHARACTERS = 3, 64, 400
COMMONEST = 20


def find_directories(target: str, overrides: list[str]) -> dict[str, Path]:
    """The committed directories behind an experiment file or a directory, by kind. Raises UserError where there are none."""
    path = Path(target)
    if path.is_dir():
        if overrides:
            raise UserError(f"{target} is a directory, which has no fields to change; leave {overrides[0]!r} out")
        if not is_committed(path):  # perhaps the user's own texts
            raise UserError(
                f"{target}: holds no prepared data; give a directory below data/ in GPTLOOM_HOME, or an experiment file"
            )
        kind = str(read_manifest(path).get("kind"))
        if kind not in ("corpus", "segment", "vocab", "tokens", "shards"):
            raise UserError(f"{target}: holds {kind!r}; give a directory below data/ in GPTLOOM_HOME, or an experiment file")
        return {kind: path.resolve()}
    config, home = load_config(target, overrides), home_dir()
    corpus_dir = corpus.find_corpus(config.data, home) or corpus.locate_corpus(config.data, home)
    if not is_committed(corpus_dir):
        raise UserError(f"{target}: its data is not prepared, or its source changed; run `gptloom data {target}` first")
    found = {"corpus": corpus_dir, "vocab": vocab.locate_vocab(config.vocab, corpus_dir, home)}
    found["shards"] = shards.locate_shards(corpus_dir, found["vocab"], home)
    for directory in found.values():
        if not is_committed(directory):
            raise UserError(f"{directory}: not there yet; run `gptloom data {target}` first")
    return found


def show_statistics(found: dict[str, Path]) -> dict[str, Any]:
    """Documents, lengths and splits of a corpus; sizes, compression, commonest and unused tokens of a vocabulary."""
    result: dict[str, Any] = {}
    for kind, directory in found.items():
        manifest = read_manifest(directory)
        result[kind] = {key: value for key, value in manifest.items() if key not in ("files", "tokens")}
        if kind == "corpus":
            _print(corpus.summarise(directory).to_string(index=False))
            _print(corpus.length_histogram(directory).to_string(index=False))
        elif kind == "shards":
            result["tokens"] = _token_statistics(directory)
    return result


def verify(found: dict[str, Path]) -> dict[str, Any]:
    """Read every byte and compare it with its manifest. Raises UserError naming the file that differs."""
    start = time.perf_counter()
    n_bytes = 0
    for kind, directory in found.items():
        n_bytes += _verify_one(kind, directory)
        _print(f"{directory}: whole")
    seconds = round(time.perf_counter() - start, 3)
    return {"verified": [str(directory) for directory in found.values()], "bytes": n_bytes, "seconds": seconds}


def show_head(found: dict[str, Path]) -> dict[str, Any]:
    """The first records of a corpus, the first ids of a vocabulary, the first tokens of shards."""
    result: dict[str, Any] = {}
    for kind, directory in found.items():
        if kind in ("corpus", "segment"):
            result["records"] = [
                {"document": r.document, "section": r.section, "bytes": r.bytes, "text": r.text[:HEAD_CHARACTERS]}
                for r in islice(corpus.read_records(directory, "train"), HEAD_RECORDS)
            ]
        elif kind == "vocab":
            result["ids"] = vocab.Vocab.load(directory).tokens[:HEAD_TOKENS]
        elif kind == "shards":
            shard_set = shards.ShardSet.open(directory)
            ids = np.asarray(shard_set.tokens("train")[:HEAD_TOKENS])
            result["tokens"] = {"ids": ids.tolist(), "text": vocab.Vocab.load(directory).decode(ids)}
        else:
            raise UserError(f"{directory}: ids without their vocabulary say little; give the shards directory instead")
    for key, value in result.items():
        _print(f"{key}: {json.dumps(value, ensure_ascii=False, indent=1)}")
    return result


LOOKS: dict[str, Callable[[dict[str, Path]], dict[str, Any]]] = {"stats": show_statistics, "verify": verify, "head": show_head}


def _token_statistics(directory: Path) -> dict[str, Any]:
    """The vocabulary at work on the training split: bytes per token, commonest tokens, tokens that never occur."""
    shard_set, names = shards.ShardSet.open(directory), vocab.Vocab.load(directory).tokens
    tokens = shard_set.tokens("train")
    counts = np.zeros(shard_set.vocab_size, dtype=np.int64)
    for part in tokens.parts if isinstance(tokens, shards.TokenView) else [tokens]:
        for begin in range(0, len(part), 1 << 24):  # bincount copies to int64
            counts += np.bincount(part[begin : begin + (1 << 24)], minlength=len(counts))
    order = np.argsort(-counts, kind="stable")[:COMMONEST]
    n_tokens = shard_set.n_tokens["train"]
    commonest = [{"id": int(i), "token": names[i], "share": float(counts[i] / n_tokens)} for i in order if counts[i]]
    unused = np.flatnonzero(counts == 0)
    per_token = shard_set.n_bytes["train"] / n_tokens
    unknown = shard_set.manifest["n_unknown"]
    _print(f"{per_token:.3f} bytes per training token; {len(unused)} of {len(counts)} ids unused")
    for row in commonest:
        _print(f"  {row['id']:>8} {row['token']!r:<20} {100 * row['share']:.2f} %")
    return {
        "bytes_per_token": per_token,
        "commonest": commonest,
        "unused": len(unused),
        "unused_first": [names[i] for i in unused[:COMMONEST]],
        "unknown_share": {split: unknown[split] / max(count, 1) for split, count in shard_set.n_tokens.items()},
    }


def _verify_one(kind: str, directory: Path) -> int:
    if kind == "shards":
        return shards.ShardSet.open(directory).verify()
    parts = [directory, *(corpus.segment_dirs(directory) if kind == "corpus" else [])]
    return sum(facts["bytes"] for part in parts for facts in verified(part)["files"].values())


def _print(text: str) -> None:
    print(text, file=sys.stderr)

"""Who turns text into byte-pair ids: one `tokenizer.json`, several libraries that read it.

fastokens (Apache 2.0) encodes what `tokenizers` encodes, id for id, some 30 times faster, so it is used where it is
installed; gigatoken is as fast within one process per core, but its newer Unicode tables change ids in rare scripts. The file
names the engine its vocabulary was made with, and encoding uses that one only.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from gptcore.config import UserError

logger = logging.getLogger(__name__)

ENGINES = ("fastokens", "tokenizers")  # the first one installed makes new vocabularies
# texts → all their ids, uint32, one after the other; offsets, int64 (texts + 1,)
Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


@cache
def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def default_engine() -> str:
    """`NAME VERSION` of the best installed engine. Raises UserError when there is none."""
    for name in ENGINES:
        if found := installed_version(name):
            return f"{name} {found}"
    raise UserError("byte pairs need the package fastokens or tokenizers, and neither is installed; pip install fastokens")


def check_engine(engine: str, *, strict: bool = False) -> None:
    """Raises UserError if an engine (`NAME VERSION`) is missing, or with `strict` if another version of it is installed."""
    name, _, wanted = engine.partition(" ")
    found = installed_version(name) if name in ENGINES else None
    if found is None or (strict and found != wanted):
        state = f"{name} {found} is installed" if found else "it is not installed"
        raise UserError(
            f"this vocabulary was made with {engine} and {state}: pip install {name}=={wanted}, or make a new vocabulary"
        )
    if found != wanted:
        logger.warning("the vocabulary was made with %s; %s %s encodes here", engine, name, found)


def open_engine(engine: str, tree: dict[str, Any]) -> Encode:
    """The encoder of a tokenizer.json's content. Special tokens written in a text are text. Raises UserError as `check_engine`."""
    check_engine(engine)
    return {"fastokens": _open_fastokens, "tokenizers": _open_tokenizers}[engine.partition(" ")[0]](json.dumps(tree))


def _open_fastokens(text: str) -> Encode:
    import fastokens

    tokenizer = fastokens.Tokenizer.from_json_str(text)

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = tokenizer.encode_batch_flat(texts, split_special_tokens=True)
        return np.frombuffer(ids, dtype="<u4"), np.frombuffer(offsets, dtype="<u8").astype(np.int64)

    return encode


def _open_tokenizers(text: str) -> Encode:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = True

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return np.fromiter((token for row in rows for token in row), dtype=np.uint32, count=int(offsets[-1])), offsets

    return encode

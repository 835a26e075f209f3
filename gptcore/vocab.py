"""Room 2, vocabulary: text becomes integers and back. Character level, learnt from the training split.

    python -m gptcore.vocab experiments/shakespeare.yaml [section.field=value …]      # prints the manifest

`home/data/vocabs/<id>/tokenizer.json` is a file the Hugging Face library `tokenizers` opens and that encodes the same:
a WordLevel model over single characters. Ids: 0 `<|endoftext|>`, 1 `<unk>`, then the characters by code point.

One difference is on purpose. Here text is only ever text: the thirteen characters "<|endoftext|>" in a document are
encoded as characters. `tokenizers` matches special tokens literally in the text it is given.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptcore import corpus
from gptcore.config import UserError, VocabConfig, load_config
from gptcore.store import commit_dir, content_id, home_dir, is_committed, read_manifest, write_json

logger = logging.getLogger(__name__)

FORMAT = 1
FILE_NAME = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
SPECIALS = (END_OF_TEXT, UNKNOWN)
CODE_POINTS = 0x110000
REPLACEMENT = "\ufffd"  # what an unknown character decodes to


class Vocab:
    """The map between characters and ids. `characters` must be distinct; their order gives the ids from 2 on."""

    eot_id = 0
    unk_id = 1

    def __init__(self, characters: Sequence[str]) -> None:
        self.tokens: list[str] = [*SPECIALS, *characters]
        codes = _code_points("".join(characters))
        assert len(codes) == len(characters), "every entry must be one character"
        # One look-up per character in each direction: 100 MB of text a second and more.
        self._id_of_code = np.full(CODE_POINTS, self.unk_id, dtype=np.int64)
        self._id_of_code[codes] = np.arange(len(SPECIALS), self.size)
        assert np.count_nonzero(self._id_of_code != self.unk_id) == len(codes), "characters must be distinct"
        self._code_of_id = np.concatenate([[0, ord(REPLACEMENT)], codes]).astype("<u4")

    @classmethod
    def load(cls, path: str | Path) -> Vocab:
        """Read `tokenizer.json`, or the one in a directory. Raises UserError if it is missing or not a character vocabulary."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            ids = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
            tokens = sorted(ids, key=ids.__getitem__)
            whole = [ids[token] for token in tokens] == list(range(len(ids)))
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); give a tokenizer.json or its directory"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            whole, tokens = False, []
        if not whole or tuple(tokens[:2]) != SPECIALS or any(len(token) != 1 for token in tokens[2:]):
            raise UserError(
                f"{path}: not a character vocabulary of gptloom; build one with python -m gptcore.vocab CONFIG.yaml"
            )
        return cls(tokens[2:])

    @property
    def size(self) -> int:
        return len(self.tokens)

    @property
    def fingerprint(self) -> str:
        """sha256 over the tokens in order, 64 hex digits: equal fingerprints, equal meaning of every id."""
        return hashlib.sha256(
            json.dumps({"kind": "char", "tokens": self.tokens}, ensure_ascii=False).encode()
        ).hexdigest()

    @property
    def token_bytes(self) -> np.ndarray:
        """(V,) int64: UTF-8 bytes each id stands for; 0 for the special tokens."""
        return np.array([0, 0, *(len(token.encode()) for token in self.tokens[2:])], dtype=np.int64)

    def encode(self, text: str) -> np.ndarray:
        """One id per character, (n,) int64. A character the vocabulary lacks becomes `unk_id`; never a failure."""
        return self._id_of_code[_code_points(text)]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of ids in 0 … size-1: "\ufffd" for `unk_id`, nothing for `eot_id`."""
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        assert array.size == 0 or (array.min() >= 0 and array.max() < self.size), f"id outside 0 … {self.size - 1}"
        return self._code_of_id[array[array != self.eot_id]].tobytes().decode("utf-32-le")

    def count_unknown(self, ids: np.ndarray) -> int:
        """How many of these ids stand for a character the vocabulary lacks."""
        return int(np.count_nonzero(ids == self.unk_id))

    def to_json(self) -> dict[str, Any]:
        """The content of tokenizer.json, as `tokenizers` reads it."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": number, "content": token, **flags} for number, token in enumerate(SPECIALS)],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": r"[\s\S]"},
                "behavior": "Isolated",
                "invert": False,
            },
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {
                "type": "WordLevel",
                "vocab": {token: number for number, token in enumerate(self.tokens)},
                "unk_token": UNKNOWN,
            },
        }


def locate_vocab(vocab: VocabConfig, corpus_dir: Path, home: Path) -> Path:
    """The directory of this corpus's vocabulary, committed yet or not."""
    name = content_id({"format": FORMAT, "settings": vocab.model_dump(), "corpus": corpus_dir.name})
    return home / "data" / "vocabs" / name


def build_vocab(vocab: VocabConfig, corpus_dir: Path, home: Path) -> Path:
    """Learn the vocabulary from the training split; return its committed directory. Early return when it is there."""
    directory = locate_vocab(vocab, corpus_dir, home)
    if is_committed(directory):
        logger.info("vocabulary %s: reused", directory.name)
        return directory
    built = Vocab(_distinct_characters(corpus.read_documents(corpus_dir, "train")))
    n_val = n_unknown = 0
    for text in corpus.read_documents(corpus_dir, "val"):
        n_val += len(text)
        n_unknown += built.count_unknown(built.encode(text))
    manifest = {
        "kind": "vocab",
        "id": directory.name,
        "format": FORMAT,
        "vocab": vocab.model_dump(),
        "corpus": corpus_dir.name,
        "size": built.size,
        "fingerprint": built.fingerprint,
        "val_characters": n_val,
        "val_unknown": n_unknown,
    }
    with commit_dir(directory, manifest) as tmp:
        write_json(tmp / FILE_NAME, built.to_json())
    logger.info(
        "vocabulary %s: %d ids; %d of %d characters of the validation split are unknown (%.3g %%)",
        directory.name, built.size, n_unknown, n_val, 100 * n_unknown / max(n_val, 1),
    )  # fmt: skip
    return directory


def main(argv: list[str]) -> dict[str, Any]:
    """`CONFIG.yaml [section.field=value …]` → the vocabulary manifest."""
    if not argv or argv[0].startswith("-"):
        raise UserError("usage: python -m gptcore.vocab CONFIG.yaml [section.field=value …]")
    config, home = load_config(argv[0], argv[1:]), home_dir()
    return read_manifest(build_vocab(config.vocab, corpus.build_corpus(config.data, home), home))


def _distinct_characters(texts: Iterable[str]) -> list[str]:
    seen = np.zeros(CODE_POINTS, dtype=bool)
    for text in texts:
        seen[_code_points(text)] = True
    return [chr(code) for code in np.flatnonzero(seen)]


def _code_points(text: str) -> np.ndarray:
    """(n,) uint32. A prompt from a terminal may hold lone surrogates; they pass, and are unknown characters."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


if __name__ == "__main__":
    from gptcore.entry import run_process

    raise SystemExit(run_process(main))

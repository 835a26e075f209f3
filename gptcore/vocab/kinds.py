"""The three kinds of vocabulary behind one interface, and the reader that tells them apart.

A `tokenizer.json` of ours says in `model.gptloom` who encodes and which token ends a text; other readers ignore that.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptcore.config import UserError
from gptcore.store import verify_file
from gptcore.vocab.engines import Encode, check_engine, open_engine

FILE_NAME = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
SPECIALS = (END_OF_TEXT, UNKNOWN)
CODE_POINTS = 0x110000
REPLACEMENT = "\ufffd"  # what an unknown character decodes to
BYTES = 256
MAX_IDS = 1 << 20  # as in vocab.size
MAX_FILE_BYTES, MAX_FILE_COMMAS = 1 << 27, 3 * MAX_IDS  # of a tokenizer.json: so many tokens, each with a merge of two
TOO_MANY = f"a vocabulary of more than {MAX_IDS:,} tokens; give a smaller one"
NOTE = "gptloom"  # our key in the file's `model`


class Vocab(ABC):
    """The map between text and ids. `Vocab.load` opens any kind.

    Attributes: kind, size (ids are 0 … size-1), eot_id, unk_id (None: no text is unknown), engine (who encodes),
    token_bytes ((size,) int64: UTF-8 bytes of text each id stands for; 0 for special tokens), fingerprint (64 hex digits:
    equal fingerprints, equal meaning of every id), tokens (each id's text, for people).
    """

    kind: str
    eot_id: int
    unk_id: int | None = None
    engine = "numpy"
    tokens: list[str]
    token_bytes: np.ndarray

    @staticmethod
    def load(path: str | Path) -> Vocab:
        """Read `tokenizer.json`, or the one in a directory. Raises UserError if it is missing or not a vocabulary."""
        tree, path = read_tree(path)
        return vocab_of(tree, str(path))

    @property
    def size(self) -> int:
        return len(self.token_bytes)

    @property
    @abstractmethod
    def fingerprint(self) -> str: ...

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The content of tokenizer.json, as `tokenizers` reads it."""

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """All ids of many texts, one after the other (uint16 or uint32), and offsets, int64 (texts + 1,)."""

    @abstractmethod
    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of ids in 0 … size-1: "\ufffd" for what is no text, nothing for special tokens."""

    def encode(self, text: str) -> np.ndarray:
        """The ids of one text, (n,) int64. Never fails: half a surrogate pair, as a terminal may give, becomes "\ufffd"."""
        return self.encode_batch([text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")])[0].astype(np.int64)

    def count_unknown(self, ids: np.ndarray) -> int:
        """How many of these ids stand for text the vocabulary lacks."""
        return 0 if self.unk_id is None else int(np.count_nonzero(ids == self.unk_id))

    def require_engine(self) -> None:  # noqa: B027 - most kinds need none
        """Raises UserError unless the very engine this vocabulary was made with is installed: called before ids are stored."""

    def _checked(self, ids: Iterable[int] | np.ndarray) -> np.ndarray:
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        assert array.size == 0 or (array.min() >= 0 and array.max() < self.size), f"id outside 0 … {self.size - 1}"
        return array


class CharVocab(Vocab):
    """One id per character. `characters` must be distinct; their order gives the ids from 2 on."""

    kind = "char"
    eot_id = 0
    unk_id = 1

    def __init__(self, characters: Sequence[str]) -> None:
        self.tokens = [*SPECIALS, *characters]
        self.token_bytes = np.array([0, 0, *(len(token.encode()) for token in characters)], dtype=np.int64)
        codes = code_points("".join(characters))
        assert len(codes) == len(characters), "every entry must be one character"
        # One look-up per character in each direction: hundreds of MB of text a second.
        self._id_of_code = np.full(CODE_POINTS, self.unk_id, dtype=np.uint16 if self.size <= 1 << 16 else np.uint32)
        self._id_of_code[codes] = np.arange(len(SPECIALS), self.size)
        assert np.count_nonzero(self._id_of_code != self.unk_id) == len(codes), "characters must be distinct"
        self._code_of_id = np.concatenate([[0, ord(REPLACEMENT)], codes]).astype("<u4")

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps({"kind": "char", "tokens": self.tokens}, ensure_ascii=False).encode()).hexdigest()

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        ids = np.empty(offsets[-1], dtype=self._id_of_code.dtype)
        for text, begin, end in zip(texts, offsets[:-1], offsets[1:], strict=True):
            # Nothing is out of range, so "clip" only spares a buffer; ASCII needs no four bytes a character.
            codes = np.frombuffer(text.encode(), dtype=np.uint8) if text.isascii() else code_points(text)
            np.take(self._id_of_code, codes, out=ids[begin:end], mode="clip")
        return ids, offsets

    def encode(self, text: str) -> np.ndarray:
        return self._id_of_code[code_points(text)].astype(np.int64)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        array = self._checked(ids)
        return self._code_of_id[array[array != self.eot_id]].tobytes().decode("utf-32-le")

    def to_json(self) -> dict[str, Any]:
        added = [special_token(number, content) for number, content in enumerate(SPECIALS)]
        each = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        vocab = {token: number for number, token in enumerate(self.tokens)}
        return _tree(added, each, {"type": "Fuse"}, {"type": "WordLevel", "vocab": vocab, "unk_token": UNKNOWN})


class TreeVocab(Vocab):
    """A vocabulary that is its tokenizer.json; `tree` must carry our note in `model`."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self._tree = tree
        note = tree["model"][NOTE]
        self.engine = note["engine"]
        self._encode: Encode | None = None
        added = {token["id"]: token for token in tree["added_tokens"]}
        names: dict[int, str] = {number: token for token, number in ids_of(tree).items()}
        names |= {number: token["content"] for number, token in added.items()}
        self._special = {number for number, token in added.items() if token["special"]}
        self._bytes = [b""] * (max(names) + 1)
        for number, name in names.items():
            if number not in self._special:
                self._bytes[number] = name.encode() if number in added else self._bytes_of(name)
        self.token_bytes = np.array([len(value) for value in self._bytes], dtype=np.int64)
        self.tokens = [
            names.get(number, "") if number in self._special else value.decode("utf-8", "replace")
            for number, value in enumerate(self._bytes)
        ]
        (self.eot_id,) = (number for number, name in names.items() if name == note["end_of_text"])
        unknown = tree["model"].get("unk_token")
        self.unk_id = tree["model"].get("unk_id") if unknown is None else ids_of(tree).get(unknown)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self._tree, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return self._tree

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._encode is None:
            self._encode = open_engine(self.engine, self._tree)
        return self._encode(texts)

    def require_engine(self) -> None:
        check_engine(self.engine, strict=True)

    def _bytes_of(self, name: str) -> bytes:
        raise NotImplementedError


class BytePairVocab(TreeVocab):
    """Byte-level byte pairs, as GPT-2's: every text has ids, and joining their bytes gives it back."""

    kind = "bpe"

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        return b"".join([self._bytes[number] for number in self._checked(ids).tolist()]).decode("utf-8", "replace")

    def _bytes_of(self, name: str) -> bytes:
        return bytes_of(name)

    @property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """The pairs in the order in which they are merged."""
        return read_merges(self._tree)


class ByteVocab(BytePairVocab):
    """One id per byte, the byte's value; then `<|endoftext|>`. No engine needed."""

    kind = "byte"

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        pieces = [text.encode() for text in texts]
        offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
        return np.frombuffer(b"".join(pieces), dtype=np.uint8).astype(np.uint16), offsets

    def require_engine(self) -> None:
        pass


class ForeignVocab(TreeVocab):
    """Any other tokenizer.json, decoded by `tokenizers`. Bytes per id are those of its text, up to a leading space."""

    kind = "other"

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        import tokenizers

        return tokenizers.Tokenizer.from_str(json.dumps(self._tree)).decode(self._checked(ids).tolist())

    def _bytes_of(self, name: str) -> bytes:
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):  # a byte that has no token of its own
            return bytes([int(name[3:5], 16)])
        return name.replace("\u2581", " ").encode()


def vocab_of(tree: dict[str, Any], origin: str) -> Vocab:
    """The vocabulary of a tokenizer.json's content. Raises UserError naming `origin` when it is none of ours."""
    try:
        check_ids(tree)
        model = tree["model"]
        if model["type"] == "WordLevel" and NOTE not in model:
            return _char_vocab(model["vocab"])
        if is_byte_level(tree):
            own = list(model["vocab"]) == [*CHARACTER_OF_BYTE, END_OF_TEXT] and not model["merges"]
            return ByteVocab(tree) if own else BytePairVocab(tree)
        return ForeignVocab(tree)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise UserError(
            f"{origin}: not a vocabulary of gptloom; give one below data/vocabs, or take this file in with vocab.source={origin}"
        ) from None


def read_tree(path: str | Path) -> tuple[dict[str, Any], Path]:
    """The content of a tokenizer.json, given itself or its directory. Raises UserError when that cannot be read, or is damaged."""
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    verify_file(path)
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        # Before it is parsed: a file of millions of entries takes gigabytes then.
        if len(content) > MAX_FILE_BYTES or content.count(b",") > MAX_FILE_COMMAS:
            raise UserError(f"{path}: {TOO_MANY}")
        tree = json.loads(content.decode())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a tokenizer.json or its directory") from None
    except UserError:
        raise
    except (ValueError, RecursionError):
        tree = None
    if (
        not isinstance(tree, dict)
        or not isinstance(tree.get("model"), dict)
        or not isinstance(tree["model"].get("vocab"), (dict, list))
    ):
        raise UserError(f"{path}: not a tokenizer.json; give one that `tokenizers` can open, or its directory")
    if len(tree["model"]["vocab"]) > MAX_IDS:
        raise UserError(f"{path}: {TOO_MANY}")
    return tree, path


def check_ids(tree: dict[str, Any]) -> None:
    """Raises ValueError or the like unless every id is stated once, from 0 on, and none so large that a table of them explodes."""
    stated = list(ids_of(tree).values())
    added = {token["id"]: token["content"] for token in tree["added_tokens"]}
    for number in (*stated, *added):
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < MAX_IDS:
            raise ValueError(f"id {number}")
    if len(set(stated)) != len(stated) or len(added) != len(tree["added_tokens"]):
        raise ValueError("an id stands for two tokens")
    if not all(isinstance(token, str) for token in (*ids_of(tree), *added.values())):
        raise ValueError("a token is no text")


def ids_of(tree: dict[str, Any]) -> dict[str, int]:
    """The model's own tokens, whose ids are stated (BPE, WordPiece, WordLevel) or counted (Unigram)."""
    vocab = tree["model"]["vocab"]
    return vocab if isinstance(vocab, dict) else {piece: number for number, (piece, _score) in enumerate(vocab)}


def is_byte_level(tree: dict[str, Any]) -> bool:
    return tree["model"].get("type") == "BPE" and (tree.get("decoder") or {}).get("type") == "ByteLevel"


def special_token(number: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **flags}


def byte_pair_tree(merges: Sequence[tuple[bytes, bytes]], engine: str) -> dict[str, Any]:
    """A tokenizer.json: ids 0 … 255 are the bytes, 256 is `<|endoftext|>`, then the merged tokens in order."""
    vocab = {character: number for number, character in enumerate(CHARACTER_OF_BYTE)} | {END_OF_TEXT: BYTES}
    written = [["".join(CHARACTER_OF_BYTE[byte] for byte in half) for half in merge] for merge in merges]
    for left, right in written:
        vocab.setdefault(left + right, len(vocab))  # two merges may make the same token
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model: dict[str, Any] = {"type": "BPE"}
    model |= {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    model |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": written}
    model[NOTE] = {"engine": engine, "end_of_text": END_OF_TEXT}
    return _tree([special_token(BYTES, END_OF_TEXT)], byte_level, byte_level, model)


def _tree(added: list[Any], pre_tokenizer: dict[str, Any], decoder: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json in which nothing else happens to a text."""
    tree = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    return tree | {"pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder, "model": model}


def read_merges(tree: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    """The merges of a byte-level tokenizer.json, in order; old files write a pair as one string."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in tree["model"]["merges"])
    return [(bytes_of(left), bytes_of(right)) for left, right in pairs]


def bytes_of(name: str) -> bytes:
    """The bytes behind a byte-level token's printable name."""
    return bytes(BYTE_OF_CHARACTER[character] for character in name)


def code_points(text: str) -> np.ndarray:
    """(n,) uint32. A prompt from a terminal may hold lone surrogates; they pass, and are unknown characters."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _char_vocab(ids: dict[str, int]) -> CharVocab:
    tokens = sorted(ids, key=ids.__getitem__)
    whole = [ids[token] for token in tokens] == list(range(len(ids)))
    if not whole or tuple(tokens[:2]) != SPECIALS or any(len(token) != 1 for token in tokens[2:]):
        raise ValueError("not ours")
    return CharVocab(tokens[2:])


def _characters_of_bytes() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019, encoder.py)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(BYTES, 2 * BYTES))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(BYTES)]


CHARACTER_OF_BYTE = _characters_of_bytes()
BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(CHARACTER_OF_BYTE)}

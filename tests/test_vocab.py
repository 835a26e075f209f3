"""The character vocabulary: the same ids as the `tokenizers` library, and nothing a text holds can break it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from gptcore.config import DataConfig, UserError, VocabConfig
from gptcore.corpus import build_corpus
from gptcore.store import read_manifest, write_json
from gptcore.vocab import Vocab, build_vocab, locate_vocab

ODD_TEXTS = [
    "",
    "plain words, and\nlines\n\n",
    "\r\n tabs\t and \x0b\x0c\x85\u2028\u2029 other line ends\r",
    "e\u0301 combining, \u00e9 composed, \u1112\u1161\u11ab jamo",
    "𝄞 astral 🏳️‍🌈 joined \U0010ffff last",
    "\ufeff mark \ufffd replacement \ufffe noncharacter",
    "a <unk b| endoftext",
    "漢字かな交じり文、اَلْعَرَبِيَّةُ",
]


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return Vocab(sorted(set("".join(ODD_TEXTS)) - {"w"}))


@pytest.fixture(scope="module")
def saved(vocab: Vocab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocab") / "tokenizer.json"
    write_json(path, vocab.to_json())
    return path


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_ids_are_those_of_tokenizers(vocab: Vocab, saved: Path, text: str) -> None:
    """Guards the file format: whoever opens tokenizer.json elsewhere must get our ids, line ends included."""
    tokenizers = pytest.importorskip("tokenizers")
    reference = tokenizers.Tokenizer.from_file(str(saved))
    ids = vocab.encode(text)
    assert ids.tolist() == reference.encode(text).ids
    known = ids[ids != vocab.unk_id]
    assert vocab.decode(known) == reference.decode(known.tolist())
    assert reference.get_vocab_size() == vocab.size
    assert reference.token_to_id("<|endoftext|>") == vocab.eot_id
    assert reference.token_to_id("<unk>") == vocab.unk_id


def test_random_text_agrees_with_tokenizers(saved: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    rng = random.Random(0)
    codes = [code for code in range(1, 0x110000, 370) if not 0xD800 <= code < 0xE000]
    vocab = Vocab([chr(code) for code in codes])
    write_json(saved.with_name("random.json"), vocab.to_json())
    reference = tokenizers.Tokenizer.from_file(str(saved.with_name("random.json")))
    text = "".join(chr(code + rng.choice((0, 0, 0, 1))) for code in rng.choices(codes, k=2000))
    ids = vocab.encode(text)
    assert ids.tolist() == reference.encode(text).ids
    assert vocab.count_unknown(ids) == sum(character not in vocab.tokens for character in text) > 0


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_round_trip(vocab: Vocab, text: str) -> None:
    ids = vocab.encode(text)
    assert ids.dtype == np.int64
    assert ids.shape == (len(text),)
    assert vocab.decode(ids) == text.replace("w", "\ufffd")
    assert vocab.decode(ids.tolist()) == vocab.decode(ids)
    assert vocab.token_bytes[ids[ids != vocab.unk_id]].sum() == len(text.replace("w", "").encode())


def test_text_never_becomes_a_special_token() -> None:
    """Guards against a document that ends another: the marker's characters are characters."""
    text = "one<|endoftext|>two<unk>"
    vocab = Vocab(sorted(set(text)))
    ids = vocab.encode(text)
    assert not {vocab.eot_id, vocab.unk_id} & set(ids.tolist())
    assert vocab.decode(ids) == text


def test_unknown_and_special_ids(vocab: Vocab) -> None:
    """Guards prompts: an unknown character, or half a surrogate pair from a terminal, is an id and not a crash."""
    assert vocab.encode("w\ud800").tolist() == [vocab.unk_id, vocab.unk_id]
    assert vocab.decode([vocab.eot_id, vocab.unk_id, vocab.eot_id]) == "\ufffd"
    assert vocab.token_bytes[:2].tolist() == [0, 0]
    with pytest.raises(AssertionError):
        vocab.decode([vocab.size])


def test_load_checks_the_file(saved: Path, vocab: Vocab, tmp_path: Path) -> None:
    for path in (saved, saved.parent):
        loaded = Vocab.load(path)
        assert (loaded.tokens, loaded.fingerprint) == (vocab.tokens, vocab.fingerprint)
    assert len(vocab.fingerprint) == 64
    assert Vocab("ab").fingerprint != Vocab("ba").fingerprint
    broken = tmp_path / "tokenizer.json"
    tree = json.loads(saved.read_text(encoding="utf-8"))
    for change in ({"ab": len(vocab.tokens)}, {"ab": 5}, {"<unk>": 0, "<|endoftext|>": 1}):
        write_json(broken, tree | {"model": {"vocab": tree["model"]["vocab"] | change}})
        with pytest.raises(UserError, match="not a character vocabulary"):
            Vocab.load(broken)
    broken.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="not a character vocabulary"):
        Vocab.load(broken)
    with pytest.raises(UserError, match="cannot be read"):
        Vocab.load(tmp_path / "missing.json")


def test_it_is_learnt_from_the_training_split_only(tmp_path: Path) -> None:
    """Guards the yardstick: a character of the validation text alone must be unknown, and counted."""
    (tmp_path / "a.txt").write_text("abcba\n" * 1000 + "ж" * 300, encoding="utf-8")
    corpus = build_corpus(DataConfig(source=str(tmp_path / "a.txt"), split="tail", val_fraction=0.1), tmp_path)
    directory = build_vocab(VocabConfig(), corpus, tmp_path)
    assert directory == locate_vocab(VocabConfig(), corpus, tmp_path) == build_vocab(VocabConfig(), corpus, tmp_path)
    vocab = Vocab.load(directory)
    assert vocab.tokens == ["<|endoftext|>", "<unk>", "\n", "a", "b", "c"]
    manifest = read_manifest(directory, verify=True)
    assert (manifest["size"], manifest["fingerprint"]) == (6, vocab.fingerprint)
    assert (manifest["val_unknown"], manifest["val_characters"]) == (300, 360)

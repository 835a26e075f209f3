"""Vocabularies: the same ids as the `tokenizers` library, no text lost, and nothing a text holds can break them."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.config import DataConfig, UserError, VocabConfig, check_config
from gptcore.corpus import build_corpus, read_documents
from gptcore.corpus.chunks import list_chunks
from gptcore.store import read_manifest, verified, write_json
from gptcore.vocab import CharVocab, Vocab, build_vocab, learning, locate_vocab
from gptcore.vocab.engines import ENGINES, default_engine, installed_version, open_engine

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
def vocab() -> CharVocab:
    return CharVocab(sorted(set("".join(ODD_TEXTS)) - {"w"}))


@pytest.fixture(scope="module")
def saved(vocab: CharVocab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocab") / "tokenizer.json"
    write_json(path, vocab.to_json(), has_checksum=False)
    return path


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_ids_are_those_of_tokenizers(vocab: CharVocab, saved: Path, text: str) -> None:
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
    vocab = CharVocab([chr(code) for code in codes])
    write_json(saved.with_name("random.json"), vocab.to_json(), has_checksum=False)
    reference = tokenizers.Tokenizer.from_file(str(saved.with_name("random.json")))
    text = "".join(chr(code + rng.choice((0, 0, 0, 1))) for code in rng.choices(codes, k=2000))
    ids = vocab.encode(text)
    assert ids.tolist() == reference.encode(text).ids
    assert vocab.count_unknown(ids) == sum(character not in vocab.tokens for character in text) > 0


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_round_trip(vocab: CharVocab, text: str) -> None:
    ids = vocab.encode(text)
    assert ids.dtype == np.int64
    assert ids.shape == (len(text),)
    assert vocab.decode(ids) == text.replace("w", "\ufffd")
    assert vocab.decode(ids.tolist()) == vocab.decode(ids)
    assert vocab.token_bytes[ids[ids != vocab.unk_id]].sum() == len(text.replace("w", "").encode())


def test_text_never_becomes_a_special_token() -> None:
    """Guards against a document that ends another: the marker's characters are characters."""
    text = "one<|endoftext|>two<unk>"
    vocab = CharVocab(sorted(set(text)))
    ids = vocab.encode(text)
    assert not {vocab.eot_id, vocab.unk_id} & set(ids.tolist())
    assert vocab.decode(ids) == text


def test_unknown_and_special_ids(vocab: CharVocab) -> None:
    """Guards prompts: an unknown character, or half a surrogate pair from a terminal, is an id and not a crash."""
    assert vocab.encode("w\ud800").tolist() == [vocab.unk_id, vocab.unk_id]
    assert vocab.decode([vocab.eot_id, vocab.unk_id, vocab.eot_id]) == "\ufffd"
    assert vocab.token_bytes[:2].tolist() == [0, 0]
    with pytest.raises(AssertionError):
        vocab.decode([vocab.size])


def test_load_checks_the_file(saved: Path, vocab: CharVocab, tmp_path: Path) -> None:
    for path in (saved, saved.parent):
        loaded = Vocab.load(path)
        assert (loaded.tokens, loaded.fingerprint) == (vocab.tokens, vocab.fingerprint)
    assert len(vocab.fingerprint) == 64
    assert CharVocab("ab").fingerprint != CharVocab("ba").fingerprint
    broken = tmp_path / "tokenizer.json"
    tree = json.loads(saved.read_text(encoding="utf-8"))
    for change in ({"ab": len(vocab.tokens)}, {"ab": 5}, {"<unk>": 0, "<|endoftext|>": 1}):
        write_json(broken, tree | {"model": {"vocab": tree["model"]["vocab"] | change}}, has_checksum=False)
        with pytest.raises(UserError, match="not a vocabulary of gptloom"):
            Vocab.load(broken)
    broken.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
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
    manifest = verified(directory)
    assert (manifest["size"], manifest["fingerprint"]) == (6, vocab.fingerprint)
    assert (manifest["val_unknown"], manifest["val_characters"]) == (300, 360)


# --- which characters ----------------------------------------------------------------------------------------------------


def char_vocab(tmp_path: Path, text: str, **fields: object) -> tuple[CharVocab, dict[str, object]]:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    data = DataConfig(source=str(tmp_path / "a.txt"), split="tail", val_fraction=0.1)
    directory = build_vocab(VocabConfig(**fields), build_corpus(data, tmp_path), tmp_path)  # type: ignore[arg-type]
    vocab = Vocab.load(directory)
    assert isinstance(vocab, CharVocab)
    return vocab, read_manifest(directory)


RARE = "aaaaaaaaab" * 1000 + "é" * 10 + "a" * 2000  # the last tenth is only a


def test_coverage_leaves_out_the_rarest(tmp_path: Path) -> None:
    """Guards "coverage": rare characters must share <unk>, and be counted, where little text is lost."""
    vocab, manifest = char_vocab(tmp_path, RARE, coverage=0.999)
    assert vocab.tokens[2:] == ["a", "b"]
    assert manifest["train_unknown"] == 10
    assert char_vocab(tmp_path, RARE, coverage=1.0)[0].tokens[2:] == ["a", "b", "é"]


def test_size_caps_the_characters(tmp_path: Path) -> None:
    assert char_vocab(tmp_path, RARE, size=3)[0].tokens[2:] == ["a"]


def test_unknown_text_can_be_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocab\.unknown=error.*'é'"):
        char_vocab(tmp_path, RARE + "é" * 20, unknown="error", coverage=0.999)
    assert not list((tmp_path / "data" / "vocabs").iterdir())


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"kind": "byte", "size": 300}, "leave vocab.size out"), ({"kind": "bpe", "size": 100}, "at least 257")],
)
def test_impossible_sizes_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_config({"vocab": fields})


# --- bytes and byte pairs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_corpus(DataConfig(source=str(small_text), split="section"), tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def bpe_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_vocab(VocabConfig(kind="bpe", size=600), corpus, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def byte_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_vocab(VocabConfig(kind="byte"), corpus, tmp_path_factory.mktemp("byte"))


def reference(directory: Path):  # type: ignore[no-untyped-def]
    tokenizers = pytest.importorskip("tokenizers")
    loaded = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    loaded.encode_special_tokens = True
    return loaded


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_byte_ids_are_those_of_tokenizers(request: pytest.FixtureRequest, corpus: Path, kind: str) -> None:
    directory = request.getfixturevalue(f"{kind}_dir")
    vocab, theirs = Vocab.load(directory), reference(directory)
    texts = [*ODD_TEXTS, *read_documents(corpus, "val")]
    ids, offsets = vocab.encode_batch(texts)
    for number, text in enumerate(texts):
        assert ids[offsets[number] : offsets[number + 1]].tolist() == theirs.encode(text).ids
    assert (vocab.kind, vocab.eot_id, vocab.unk_id) == (kind, 256, None)
    assert theirs.get_vocab_size() == vocab.size
    assert theirs.token_to_id("<|endoftext|>") == vocab.eot_id


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_every_string_comes_back(byte_dir: Path, bpe_dir: Path, text: str) -> None:
    """Guards "lossless for every valid string", and the byte counts that bits per byte divides by."""
    for directory in (byte_dir, bpe_dir):
        vocab = opened(directory)
        ids = vocab.encode(text)
        assert vocab.decode(ids) == text
        assert vocab.token_bytes[ids].sum() == len(text.encode())
        assert vocab.eot_id not in ids


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_every_string_of_the_alphabet_comes_back(text: str) -> None:
    vocab = CharVocab(sorted(set(text)))
    assert vocab.decode(vocab.encode(text)) == text
    assert vocab.encode_batch([text, "", text])[0].tolist() == vocab.encode(text).tolist() * 2


@cache
def opened(directory: Path) -> Vocab:
    return Vocab.load(directory)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_byte_vocabularies_hold_against_odd_prompts(request: pytest.FixtureRequest, kind: str) -> None:
    vocab = Vocab.load(request.getfixturevalue(f"{kind}_dir"))
    assert vocab.decode(vocab.encode("w\ud800")) == "w\ufffd"
    assert vocab.decode([vocab.eot_id, 0xC3, 0xA9, 0xFF, vocab.eot_id]) == "é\ufffd"
    text = "one<|endoftext|>two<unk>"
    assert vocab.eot_id not in vocab.encode(text)
    assert vocab.decode(vocab.encode(text)) == text


def test_training_is_deterministic_and_the_same_for_every_trainer(
    corpus: Path, bpe_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the fallback: a machine without the fast trainer must learn the very same vocabulary."""
    again = build_vocab(VocabConfig(kind="bpe", size=600), corpus, tmp_path / "again")
    assert (again / "tokenizer.json").read_bytes() == (bpe_dir / "tokenizer.json").read_bytes()
    sample = tmp_path / "sample"
    sample.write_bytes(b"".join(text.encode() + b"\xff" for text in read_documents(corpus, "train")))
    slow = learning.train_byte_pairs(str(sample), 600, "tokenizers")
    assert slow == Vocab.load(bpe_dir).merges  # type: ignore[attr-defined]
    assert len(slow) == 600 - 257


def test_bpe_is_learnt_from_a_bounded_sample(corpus: Path, tmp_path: Path) -> None:
    """Guards memory: only about `sample_bytes` of text may reach the trainer, and always the same ones."""
    chunks = [chunk for chunk in list_chunks(corpus) if chunk.split == "train"]
    whole = b"".join(learning.sample_chunk((chunk, 1.0)) for chunk in chunks)
    part = b"".join(learning.sample_chunk((chunk, 0.3)) for chunk in chunks)
    assert 0 < len(part) < 0.7 * len(whole)
    assert set(part.split(b"\xff")) <= set(whole.split(b"\xff"))


def test_report_says_what_smaller_vocabularies_would_do(bpe_dir: Path) -> None:
    manifest = read_manifest(bpe_dir)
    measured = manifest["bytes_per_token"]
    assert list(measured) == ["512", "600"]
    assert 1 < measured["512"] < measured["600"]
    assert manifest["agreement"]["same"] == manifest["agreement"]["documents"] > 0
    assert manifest["engine"] == default_engine()


def test_too_little_text_gives_fewer_ids(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab ab ab\n\n" * 200, encoding="utf-8")
    corpus = build_corpus(DataConfig(source=str(tmp_path / "a.txt"), split="tail", val_fraction=0.2), tmp_path)
    vocab = Vocab.load(build_vocab(VocabConfig(kind="bpe", size=5000), corpus, tmp_path))
    assert 257 < vocab.size < 300


# --- engines ------------------------------------------------------------------------------------------------------------


def test_the_file_names_its_engine(bpe_dir: Path, tmp_path: Path) -> None:
    """Guards against ids of another library: the engine is part of the fingerprint, and no other one encodes."""
    tree = json.loads((bpe_dir / "tokenizer.json").read_text(encoding="utf-8"))
    assert tree["model"]["gptloom"] == {"engine": default_engine(), "end_of_text": "<|endoftext|>"}
    name = default_engine().partition(" ")[0]
    for engine, strict_only in ((f"{name} 0.0.1", True), ("nosuchengine 1.0", False)):
        tree["model"]["gptloom"]["engine"] = engine
        write_json(tmp_path / "tokenizer.json", tree, has_checksum=False)
        vocab = Vocab.load(tmp_path)
        assert vocab.fingerprint != Vocab.load(bpe_dir).fingerprint
        with pytest.raises(UserError, match=f"made with {engine}"):
            vocab.require_engine()
        if strict_only:
            assert vocab.decode(vocab.encode("text")) == "text"
        else:
            with pytest.raises(UserError, match="not installed"):
                vocab.encode("text")


def test_engines_agree(bpe_dir: Path, corpus: Path) -> None:
    tree = json.loads((bpe_dir / "tokenizer.json").read_text(encoding="utf-8"))
    texts = [*ODD_TEXTS, *read_documents(corpus, "val"), "<|endoftext|>"]
    found = [open_engine(f"{name} {installed_version(name)}", tree)(texts) for name in ENGINES if installed_version(name)]
    for ids, offsets in found[1:]:
        assert np.array_equal(ids, found[0][0])
        assert np.array_equal(offsets, found[0][1])


# --- taken in ------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_from_elsewhere_is_taken_in(corpus: Path, tmp_path: Path) -> None:
    """Guards `vocab.source`: the ids of a published file, its end of text found, special tokens only ours to write."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(read_documents(corpus, "train"), vocab_size=500, special_tokens=["<pad>", "</s>"])
    theirs.save(str(tmp_path / "theirs.json"))
    taken = VocabConfig(source=str(tmp_path / "theirs.json"))
    directory = build_vocab(taken, corpus, tmp_path)
    vocab = Vocab.load(directory)
    assert (vocab.size, vocab.eot_id, vocab.tokens[0]) == (500, 1, "<pad>")
    text = next(read_documents(corpus, "val")) + "</s>"
    assert vocab.encode(text[:-4]).tolist() == theirs.encode(text[:-4]).ids
    assert vocab.eot_id not in vocab.encode(text)
    assert vocab.decode(vocab.encode(text)) == text
    # Frozen: another corpus has the same vocabulary.
    assert locate_vocab(taken, tmp_path / "another", tmp_path) == directory
    assert Vocab.load(build_vocab(VocabConfig(source=str(directory)), corpus, tmp_path / "b")).fingerprint == vocab.fingerprint


def test_a_tokenizer_without_end_of_text_gets_one(corpus: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(read_documents(corpus, "train"), vocab_size=400)
    theirs.save(str(tmp_path / "theirs.json"))
    vocab = Vocab.load(build_vocab(VocabConfig(source=str(tmp_path / "theirs.json")), corpus, tmp_path))
    assert (vocab.size, vocab.eot_id, vocab.tokens[400]) == (401, 400, "<|endoftext|>")


def test_a_tokenizer_that_loses_text_is_refused(corpus: Path, tmp_path: Path) -> None:
    """Guards bits per byte: with a lower-casing tokenizer they would be those of another text."""
    tokenizers = pytest.importorskip("tokenizers")
    lossy = tokenizers.Tokenizer(tokenizers.models.BPE())
    lossy.normalizer = tokenizers.normalizers.Lowercase()
    lossy.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    lossy.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    lossy.train_from_iterator(read_documents(corpus, "train"), trainer)
    lossy.save(str(tmp_path / "lossy.json"))
    with pytest.raises(UserError, match="do not come back whole"):
        build_vocab(VocabConfig(source=str(tmp_path / "lossy.json")), corpus, tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": 3}', '{"model": {"type": "BPE"}}'])
def test_files_that_are_no_tokenizers_are_refused(corpus: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    for attempt in (lambda: Vocab.load(path), lambda: build_vocab(VocabConfig(source=str(path)), corpus, tmp_path)):
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            attempt()

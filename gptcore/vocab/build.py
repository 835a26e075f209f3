"""A corpus's vocabulary in its committed directory: learnt from the training split, or taken in, and measured."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from gptcore import corpus
from gptcore.config import UserError, VocabConfig
from gptcore.parallel import ChunkMap, map_processes
from gptcore.store import commit_dir, content_id, hash_file, is_committed, verified, write_json
from gptcore.vocab import learning
from gptcore.vocab.engines import default_engine
from gptcore.vocab.kinds import FILE_NAME, ByteVocab, CharVocab, Vocab, byte_pair_tree, read_tree, vocab_of

logger = logging.getLogger(__name__)

FORMAT = 2
SAMPLE_BYTES = 1 << 19  # of validation text, on which a vocabulary is measured
LEAST_AGREEMENT = 0.999  # of documents whose ids are those of `tokenizers`


def locate_vocab(vocab: VocabConfig, corpus_dir: Path, home: Path) -> Path:
    """The directory of this corpus's vocabulary, committed yet or not. One that is taken in (`vocab.source`) knows no corpus."""
    key: dict[str, Any] = {"format": FORMAT, "unknown": vocab.unknown}
    if vocab.source is not None:
        _, path = read_tree(Path(vocab.source).expanduser())
        key |= {"source": hash_file(path), "engine": default_engine()}
    else:
        used = {"char": {"size", "coverage"}, "byte": set(), "bpe": {"size", "sample_bytes"}}[vocab.kind]
        key |= {"kind": vocab.kind, **vocab.model_dump(include=used)}
        if vocab.kind != "byte":
            key["corpus"] = corpus_dir.name
        if vocab.kind == "bpe":
            key["engine"] = default_engine()
    return home / "data" / "vocabs" / content_id(key)


def build_vocab(vocab: VocabConfig, corpus_dir: Path, home: Path, chunk_map: ChunkMap = map_processes) -> Path:
    """Learn the vocabulary from the training split, or take one in; return its committed directory. Early return when it is there.

    Raises DamagedError when it is there and damaged, UserError for a `vocab.source` that is no lossless tokenizer, or with `vocab.unknown: error` for a character of
    the validation text that training text lacks.
    """
    directory = locate_vocab(vocab, corpus_dir, home)
    if is_committed(directory):
        verified(directory)
        logger.info("vocabulary %s: reused", directory.name)
        return directory
    manifest: dict[str, Any] = {"kind": "vocab", "id": directory.name, "format": FORMAT}
    manifest |= {"vocab": vocab.model_dump(), "corpus": corpus_dir.name}
    with commit_dir(directory, manifest) as tmp:
        built, facts = _make(vocab, corpus_dir, tmp, chunk_map)
        manifest |= {"size": built.size, "fingerprint": built.fingerprint, "engine": built.engine, **facts}
        write_json(tmp / FILE_NAME, built.to_json(), has_checksum=False)
    logger.info("vocabulary %s: %s, %d ids, %s", directory.name, built.kind, built.size, built.engine)
    return directory


def _make(vocab: VocabConfig, corpus_dir: Path, tmp: Path, chunk_map: ChunkMap) -> tuple[Vocab, dict[str, Any]]:
    """The vocabulary and what was measured of it."""
    if vocab.source is None and vocab.kind == "char":
        return _make_char(vocab, corpus_dir, chunk_map)
    sample = learning.sample_texts(corpus_dir, SAMPLE_BYTES)
    facts: dict[str, Any] = {"val_unknown": 0}
    if vocab.source is not None:
        built = learning.adopt(vocab.source, sample)
    elif vocab.kind == "byte":
        return ByteVocab(byte_pair_tree([], "numpy")), {}
    else:
        size = vocab.size or learning.BPE_SIZE
        merges = learning.learn_merges(corpus_dir, size, vocab.sample_bytes, tmp / "sample", chunk_map)
        built = vocab_of(byte_pair_tree(merges, default_engine()), "bpe")
        facts["trainer"] = learning.trainer_name()
        if built.size < size:
            logger.info("the text has byte pairs for %d ids only", built.size)
    if built.kind != "char":
        facts["agreement"] = learning.measure_agreement(built, sample)
        same, documents = facts["agreement"]["same"], facts["agreement"]["documents"]
        if same < LEAST_AGREEMENT * documents:
            raise UserError(
                f"{built.engine} encodes {documents - same} of {documents} documents differently from `tokenizers`; "
                "uninstall it to use `tokenizers` instead"
            )
    return built, facts | {"bytes_per_token": learning.measure_compression(built, sample, smaller=vocab.source is None)}


def _make_char(vocab: VocabConfig, corpus_dir: Path, chunk_map: ChunkMap) -> tuple[Vocab, dict[str, Any]]:
    counts = learning.count_characters(corpus_dir, chunk_map, exact=vocab.coverage < 1 or vocab.size is not None)
    built = CharVocab(learning.choose_characters(counts["train"], vocab.coverage, vocab.size))
    known = {ord(token) for token in built.tokens[2:]}
    unknown = {split: sum(count for code, count in counts[split].items() if code not in known) for split in corpus.SPLITS}
    total = sum(counts["val"].values())
    if vocab.unknown == "error" and any(unknown.values()):
        rare = [chr(code) for split in corpus.SPLITS for code in counts[split] if code not in known][:5]
        raise UserError(
            f"vocab.unknown=error: the text has characters that the vocabulary lacks, {rare} among them; "
            "use vocab.unknown=replace, vocab.coverage=1, or vocab.kind=byte"
        )
    share = 100 * unknown["val"] / max(total, 1)
    logger.info("%d of %d characters of the validation split are unknown (%.3g %%)", unknown["val"], total, share)
    return built, {"val_characters": total, "val_unknown": unknown["val"], "train_unknown": unknown["train"]}

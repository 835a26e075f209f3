"""What a vocabulary learns from the training split, and how good it is on the validation split.

Every step goes chunk by chunk, so memory does not grow with the corpus; byte pairs are learnt from a bounded sample.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from gptcore import corpus
from gptcore.config import UserError
from gptcore.corpus.chunks import Chunk, list_chunks, read_chunk
from gptcore.parallel import ChunkMap, progress_bar, run_apart
from gptcore.vocab import kinds
from gptcore.vocab.engines import default_engine, installed_version, open_engine
from gptcore.vocab.kinds import BYTES, END_OF_TEXT, BytePairVocab, Vocab

logger = logging.getLogger(__name__)

BPE_SIZE = 32_000
SEPARATOR = b"\xff"  # in no UTF-8 text: pairs are never learnt across records
# Names under which published vocabularies end a text, most particular first.
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "</s>", "<eos>", "[SEP]")
LEAST_ROUND_TRIP = 0.99


# --- characters ----------------------------------------------------------------------------------------------------------


def count_characters(corpus_dir: Path, chunk_map: ChunkMap, *, exact: bool) -> dict[str, Counter[int]]:
    """How often each code point occurs in each split. Unless `exact`, the training text's are only found: 1 for each."""
    chunks = list_chunks(corpus_dir)
    jobs = [(chunk, exact or chunk.split == "val") for chunk in chunks]
    totals: dict[str, Counter[int]] = {"train": Counter(), "val": Counter()}
    with progress_bar("counting characters", sum(chunk.bytes for chunk in chunks)) as progress:
        for chunk, counts in zip(chunks, chunk_map(count_chunk, jobs), strict=True):
            if exact or chunk.split == "val":
                totals[chunk.split].update(counts)
            else:
                totals["train"] |= Counter(counts)
            progress.update(chunk.bytes)
    return totals


def choose_characters(counts: Mapping[int, int], coverage: float, size: int | None) -> list[str]:
    """The commonest characters that make up `coverage` of the text, at most `size` - 2 of them, by code point."""
    ranked = sorted(counts, key=lambda code: (-counts[code], code))
    wanted = math.ceil(coverage * sum(counts.values()))
    covered = np.cumsum([counts[code] for code in ranked])
    keep = min(int(np.searchsorted(covered, wanted)) + 1, len(ranked))
    if size is not None:
        keep = min(keep, size - 2)
    return [chr(code) for code in sorted(ranked[:keep])]


def count_chunk(job: tuple[Chunk, bool]) -> dict[int, int]:
    """How often each code point occurs in a chunk, or 1 for each that does."""
    chunk, exact = job
    if exact:
        found: Counter[int] = Counter()
        for some in read_chunk(chunk):
            codes, counts = np.unique(kinds.code_points("".join(some.texts)), return_counts=True)
            found.update(dict(zip(codes.tolist(), counts.tolist(), strict=True)))
        return dict(found)
    seen = np.zeros(kinds.CODE_POINTS, dtype=bool)
    known = b""  # ASCII that was met: deleting it from a text costs a fraction of looking at each character
    for text in chain.from_iterable(some.texts for some in read_chunk(chunk)):
        if text.isascii():
            news = text.encode().translate(None, known)
            if news:
                known += bytes(set(news))
        else:
            seen[kinds.code_points(text)] = True
    seen[list(known)] = True
    return dict.fromkeys(np.flatnonzero(seen).tolist(), 1)


# --- byte pairs ----------------------------------------------------------------------------------------------------------


def trainer_name() -> str:
    """Who learns byte pairs here: gigatoken where it is installed, else `tokenizers`; their merges are the same."""
    name = "gigatoken" if installed_version("gigatoken") else "tokenizers"
    return f"{name} {installed_version(name)}"


def learn_merges(corpus_dir: Path, size: int, sample_bytes: int, path: Path, chunk_map: ChunkMap) -> list[tuple[bytes, bytes]]:
    """Byte pairs for at most `size` ids from about `sample_bytes` of training text (0: all), which is put in `path` meanwhile."""
    chunks = [chunk for chunk in list_chunks(corpus_dir) if chunk.split == "train"]
    total = sum(chunk.bytes for chunk in chunks)
    share = 1.0 if sample_bytes == 0 else min(1.0, sample_bytes / max(total, 1))
    with open(path, "wb") as file, progress_bar("sampling text", total) as progress:
        for chunk, text in zip(chunks, chunk_map(sample_chunk, [(chunk, share) for chunk in chunks]), strict=True):
            file.write(text)
            progress.update(chunk.bytes)
    n_bytes = path.stat().st_size
    logger.info("learning %d byte pairs from %.1f MB with %s", size - BYTES - 1, n_bytes / 1e6, trainer_name())
    # A process of its own: the trainers write to stdout, and their memory is given back.
    merges = run_apart(train_byte_pairs, str(path), size, trainer_name().partition(" ")[0]) if n_bytes else []
    path.unlink()
    return merges


def train_byte_pairs(path: str, size: int, trainer: str) -> list[tuple[bytes, bytes]]:
    """Merges for `size` ids from records separated by 0xFF bytes; ties go as in `tokenizers`, whoever trains."""
    if trainer == "gigatoken":
        from gigatoken.gigatoken_rs import TextFileSource, train_bpe

        return train_bpe(TextFileSource([path], separator=SEPARATOR), size, [END_OF_TEXT])[1]
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = kinds.CHARACTER_OF_BYTE
    learner = trainers.BpeTrainer(vocab_size=size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_read_records(path), learner)
    return kinds.read_merges(json.loads(tokenizer.to_str()))


def _read_records(path: str) -> Iterator[str]:
    rest = b""
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            *whole, rest = (rest + block).split(SEPARATOR)
            yield from (record.decode() for record in whole)


def sample_chunk(job: tuple[Chunk, float]) -> bytes:
    """The chosen training records, each followed by SEPARATOR. A record is chosen by its own text, so always or never."""
    chunk, share = job
    chosen = (text.encode() for text in chain.from_iterable(some.texts for some in read_chunk(chunk)))
    limit = int(share * (1 << 64))
    return b"".join(
        text + SEPARATOR
        for text in chosen
        if share == 1.0 or int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") < limit
    )


# --- a vocabulary from elsewhere -------------------------------------------------------------------------------------------


def adopt(source: str, sample: list[str]) -> Vocab:
    """The vocabulary of a tokenizer.json made elsewhere (or by us), with our note in it.

    Without its post-processor, since only shards write special tokens; with `<|endoftext|>` added where no token ends a text.
    Raises UserError when it cannot be opened, or loses text: then no loss per byte would mean anything.
    """
    tree, path = kinds.read_tree(Path(source).expanduser())
    if tree["model"].get("type") == "WordLevel" and kinds.NOTE not in tree["model"]:
        return kinds.vocab_of(tree, str(path))
    if kinds.NOTE not in tree["model"]:
        tree |= {"truncation": None, "padding": None, "post_processor": None}
        _note_end_of_text(tree)
        tree["model"][kinds.NOTE]["engine"] = _first_engine_that_opens(tree, path)
    built = kinds.vocab_of(tree, str(path))
    whole = sum(built.decode(built.encode(text)) == text for text in sample)
    if whole < LEAST_ROUND_TRIP * len(sample):
        raise UserError(
            f"vocab.source={source}: {len(sample) - whole} of {len(sample)} texts do not come back whole from its ids; "
            "give a byte-level tokenizer, or learn one with vocab.kind=bpe"
        )
    return built


def _note_end_of_text(tree: dict[str, Any]) -> None:
    tree.setdefault("added_tokens", [])
    names = kinds.ids_of(tree) | {token["content"]: token["id"] for token in tree["added_tokens"]}
    end = next((name for name in END_NAMES if name in names), None)
    if end is None:
        end = END_OF_TEXT
        tree["added_tokens"].append(kinds.special_token(max(names.values()) + 1, end))
    elif not any(token["content"] == end for token in tree["added_tokens"]):
        tree["added_tokens"].append(kinds.special_token(names[end], end))
    tree["model"][kinds.NOTE] = {"engine": "", "end_of_text": end}


def _first_engine_that_opens(tree: dict[str, Any], path: Path) -> str:
    best = default_engine()
    for engine in dict.fromkeys((best, f"tokenizers {installed_version('tokenizers')}")):
        try:
            open_engine(engine, tree)(["text"])
            return engine
        except UserError:
            raise
        except Exception as error:  # libraries of several languages, one meaning: it does not read this file
            logger.info("%s: %s does not read it (%s)", path, engine, error)
    raise UserError(f"{path}: not a tokenizer.json that {best} or `tokenizers` can open; check the file")


# --- how good it is --------------------------------------------------------------------------------------------------------


def sample_texts(corpus_dir: Path, n_bytes: int) -> list[str]:
    """The first records of the validation split, about `n_bytes` of them."""
    texts: list[str] = []
    for text in corpus.read_documents(corpus_dir, "val"):
        texts.append(text)
        n_bytes -= len(text)
        if n_bytes <= 0:
            break
    return texts


def measure_agreement(vocab: Vocab, texts: list[str]) -> dict[str, int]:
    """On how many texts the ids are those of `tokenizers`; the others must round-trip, which is asserted."""
    ids, offsets = vocab.encode_batch(texts)
    theirs, their_offsets = open_engine(f"tokenizers {installed_version('tokenizers')}", vocab.to_json())(texts)
    same = 0
    for number, text in enumerate(texts):
        ours = ids[offsets[number] : offsets[number + 1]]
        if np.array_equal(ours, theirs[their_offsets[number] : their_offsets[number + 1]]):
            same += 1
        else:
            assert vocab.decode(ours) == text, f"record {number}: neither the ids of `tokenizers` nor a round trip"
    return {"documents": len(texts), "same": same}


def measure_compression(vocab: Vocab, texts: list[str], *, smaller: bool) -> dict[str, float]:
    """Bytes of text per token at this size and, for byte pairs of ours, at `smaller` ones: their first merges."""
    n_bytes = sum(len(text.encode()) for text in texts)
    if not n_bytes:
        return {}
    measured = {}
    if smaller and isinstance(vocab, BytePairVocab):
        size = 512
        while size < vocab.size:
            shorter = kinds.vocab_of(kinds.byte_pair_tree(vocab.merges[: size - BYTES - 1], vocab.engine), "smaller")
            measured[str(size)] = round(n_bytes / max(len(shorter.encode_batch(texts)[0]), 1), 4)
            size *= 2
    measured[str(vocab.size)] = round(n_bytes / max(len(vocab.encode_batch(texts)[0]), 1), 4)
    return measured

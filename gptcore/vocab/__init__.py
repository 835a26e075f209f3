"""Room 2, vocabulary: text becomes integers and back, by characters, bytes or byte pairs.

`home/data/vocabs/<id>/tokenizer.json` is a file the Hugging Face library `tokenizers` opens and that encodes the same:

    char   a WordLevel model over single characters: 0 `<|endoftext|>`, 1 `<unk>`, then the characters by code point
    byte   0 … 255 are the bytes, 256 is `<|endoftext|>`
    bpe    the same, then byte pairs in the order they were learnt (Sennrich et al. 2016; byte-level as in GPT-2)

One difference is on purpose. Here text is only ever text: the thirteen characters "<|endoftext|>" in a document are
encoded as characters. `tokenizers` matches special tokens literally unless told `encode_special_tokens`.

Opening a char or byte vocabulary needs NumPy only.
"""

from gptcore.vocab.build import build_vocab, locate_vocab
from gptcore.vocab.kinds import FILE_NAME, ByteVocab, CharVocab, Vocab

__all__ = ["FILE_NAME", "ByteVocab", "CharVocab", "Vocab", "build_vocab", "locate_vocab"]

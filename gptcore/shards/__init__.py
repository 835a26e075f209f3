"""Room 3, shards: token ids on disk, memory-mapped, in files that describe themselves.

A shard is llm.c's format (`gptcore.shards.format`). Before each record stands `<|endoftext|>`, which counts zero bytes. Every
segment of the corpus has a directory of ids of its own (`gptcore.shards.encoding`); `home/data/shards/<id>/` strings them
together for one vocabulary:

    manifest.json                      the ordered list of those directories, as relative paths, and the totals
    token_bytes.npy, tokenizer.json    bytes per id (V,); the vocabulary

Writing reads Parquet (pyarrow); opening needs NumPy only.
"""

from gptcore.shards.build import Prepared, is_complete, locate_shards, open_whole, prepare, write_shards
from gptcore.shards.format import ShardWriter, TokenView, map_shard
from gptcore.shards.shard_set import ShardSet, Source, SplitTooSmall

__all__ = ["Prepared", "ShardSet", "ShardWriter", "Source", "SplitTooSmall", "TokenView"]
__all__ += ["is_complete", "locate_shards", "map_shard", "open_whole", "prepare", "write_shards"]

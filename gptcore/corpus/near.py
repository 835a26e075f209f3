"""Near-duplicates: records that share most of their 5-word sequences, by MinHash and LSH (Broder, 1997), through datasketch.

Signatures of 64 hashes estimate the Jaccard similarity within about 0.1; records are compared with the first seen of
their kind only, so of a chain of versions all follow the first.
"""

from __future__ import annotations

from zlib import crc32

import numpy as np

PERMUTATIONS = 64
SCHEME = "affine32"  # datasketch's 32-bit permutations: what a signature is made with belongs to it
WORDS = 5
SIGNATURE_BYTES = 4 * PERMUTATIONS


def sign_text(utf8: bytes) -> bytes:
    """64 little-endian uint32: the record's MinHash over its distinct sequences of five lower-case words."""
    from datasketch import MinHash

    words = utf8.lower().split()
    shingles = {b" ".join(words[at : at + WORDS]) for at in range(max(len(words) - WORDS + 1, 1))}
    sketch = MinHash(num_perm=PERMUTATIONS, hashfunc=crc32, scheme=SCHEME)
    sketch.update_batch(shingles)
    return sketch.hashvalues.astype("<u4").tobytes()


class NearIndex:
    """The first of every kind of record, with its side of the split."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH

        self.lsh = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
        self.threshold = threshold
        self.sides: list[bool] = []
        self.signatures: list[bytes] = []

    def follow(self, signature: bytes, is_val: bool) -> bool | None:
        """The side of the earlier record that this one is like; None, and from now on it is the first, if there is none."""
        from datasketch import MinHash

        values = np.frombuffer(signature, dtype="<u4").astype(np.uint32)
        sketch = MinHash(num_perm=PERMUTATIONS, hashvalues=values, hashfunc=crc32, scheme=SCHEME)
        # LSH proposes by chance: what it proposes is compared, the most similar wins, the first of equals.
        likeness = [
            (-float(np.mean(np.frombuffer(self.signatures[i], dtype="<u4") == values)), i) for i in self.lsh.query(sketch)
        ]
        best = min(likeness, default=(0.0, 0))
        if -best[0] >= self.threshold:
            return self.sides[best[1]]
        self.lsh.insert(len(self.sides), sketch, check_duplication=False)
        self.sides.append(is_val)
        self.signatures.append(signature)
        return None

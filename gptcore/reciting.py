"""Text that a model recites: greedy decoding writes it word for word (extractable memorization: Carlini et al. 2021, 2023).

The guard of the nights and the memorization study measure it here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gptcore.device import Device
from gptcore.models import LanguageModel
from gptcore.shards import ShardSet

RECITED_BYTES = 48  # so many in a row count as recited: about eight words
WINDOWS = 128
WINDOWS_AT_ONCE = 32


@dataclass(frozen=True)
class Recital:
    """Windows of T + 1 ids of a text, and at which places the likeliest id is the text's own.

    Greedy decoding repeats a text exactly as long as that is so at every place, so one forward pass over the text tells what
    any prompt in it would be continued with.
    """

    starts: np.ndarray  # (windows,) where they begin in the text
    is_right: np.ndarray  # (windows, T) for every id after a window's first
    sizes: np.ndarray  # (windows, T) UTF-8 bytes of these ids

    @property
    def share(self) -> float:
        """Share (0 to 1) of bytes in recited runs of RECITED_BYTES or more.

        In windows that hold fewer than twice RECITED_BYTES, half a window is a run.
        """
        least = min(RECITED_BYTES, int(self.sizes.sum(1).mean() / 2))
        runs = sum(_long_runs(right, size, least) for right, size in zip(self.is_right, self.sizes, strict=True))
        return float(runs / self.sizes.sum())

    def is_continued(self, prompt: int, tokens: int) -> np.ndarray:
        """(windows,) bool: whether the first `prompt` ids of a window are continued with the `tokens` ids that follow there."""
        assert 1 <= prompt <= prompt + tokens <= self.is_right.shape[1] + 1, (prompt, tokens)
        return np.all(self.is_right[:, prompt - 1 : prompt - 1 + tokens], axis=1)


@torch.no_grad()
def recite(model: LanguageModel, shards: ShardSet, split: str, device: Device, windows: int = WINDOWS) -> Recital:
    """What `model` recites of a split, in so many windows of its `block_size` + 1 ids at equal distances."""
    T = model.block_size
    tokens = np.asarray(shards.tokens(split)[:])
    starts = np.unique(np.linspace(0, len(tokens) - T - 1, windows).astype(np.int64))
    ids = torch.from_numpy(np.stack([tokens[s : s + T + 1] for s in starts]).astype(np.int64))  # (windows, T + 1)
    hits = []
    for part in ids.split(WINDOWS_AT_ONCE):
        with device.autocast():
            logits = model(part[:, :-1].to(device.torch))[0]  # (B, T, V)
        hits.append((logits.argmax(-1).cpu() == part[:, 1:]).numpy())
    return Recital(starts, np.concatenate(hits), shards.token_bytes[ids[:, 1:].numpy()].astype(np.int64))


def _long_runs(is_right: np.ndarray, sizes: np.ndarray, least: int) -> int:
    """Bytes in runs of right ids that hold `least` bytes or more. is_right, sizes: (T,)."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], is_right.astype(np.int8), [0]))))
    sums = np.concatenate(([0], np.cumsum(sizes)))
    runs = sums[edges[1::2]] - sums[edges[::2]]
    return int(runs[runs >= least].sum())

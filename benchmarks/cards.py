"""The GPUs that several runs of a benchmark share. A module, not a script."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def visible_cards() -> list[str]:
    """What CUDA_VISIBLE_DEVICES of a process with one of this process's GPUs is set to."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def environment(card: str | None) -> dict[str, str]:
    """This process's, with one card to be seen where one is given."""
    return {**os.environ} if card is None else {**os.environ, "CUDA_VISIBLE_DEVICES": card}


class Cards:
    """Lends the GPUs one by one, each to one user at a time."""

    def __init__(self) -> None:
        self._free: queue.Queue[str] = queue.Queue()
        for card in visible_cards():
            self._free.put(card)

    @contextmanager
    def lent(self) -> Iterator[str]:
        card = self._free.get()
        try:
            yield card
        finally:
            self._free.put(card)

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


def seeing(card: str | None) -> dict[str, str]:
    """What a process's environment needs so that it sees that card alone, where one is given."""
    return {} if card is None else {"CUDA_VISIBLE_DEVICES": card}


@contextmanager
def lent(free: queue.SimpleQueue[str]) -> Iterator[str]:
    """One of the free cards, for one user at a time."""
    card = free.get()
    try:
        yield card
    finally:
        free.put(card)

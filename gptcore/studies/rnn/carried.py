"""A recurrent state that goes on from window to window: in training (truncated back-propagation through time, Williams & Peng 1990)
and in evaluation, against one that starts at zero in every window.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptcore.config import ExperimentConfig
from gptcore.device import Device
from gptcore.errors import Stopped
from gptcore.models import LanguageModel
from gptcore.shards import ShardSet
from gptcore.train import build_trainer, train_step

STREAMS = 16  # of the validation text in evaluation: few, so that few windows start cold


class ContiguousSampler:
    """Row r of step s + 1 goes on where row r of step s ended: `rows` places in the text, evenly apart, all moving forward."""

    def __init__(self, tokens: Any, block_size: int, rows: int) -> None:
        self.tokens, self.block_size, self.rows = tokens, block_size, rows

    def batch(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples `start` … of one step; x, y int64 (count, T)."""
        assert start % self.rows == 0, (start, self.rows)
        assert count == self.rows, (count, self.rows)
        n = len(self.tokens)
        places = np.arange(self.rows) * (n // self.rows) + start // self.rows * self.block_size
        reach = (places[:, None] + np.arange(self.block_size + 1)) % n  # (rows, T + 1)
        windows = np.asarray(self.tokens[0:n])[reach].astype(np.int64)
        return windows[:, :-1], windows[:, 1:]


class CarriedForward:
    """The model as a training step calls it, with the state of the step before; gradients stop there."""

    def __init__(self, model: LanguageModel, rows: int) -> None:
        self.model, self.state = model, model.new_cache(rows)

    def __call__(self, x: Tensor, y: Tensor, reduction: str) -> tuple[Tensor | None, Tensor | None]:
        self.state.detach()
        return self.model(x, y, cache=self.state, reduction=reduction)


def train_carried(config: ExperimentConfig, shards: ShardSet, stop: Any) -> LanguageModel:
    """The trained model; as long as `config` says, whole batches. Raises Stopped when `stop` is true."""
    trainer = build_trainer(config, shards)
    rows = config.train.global_batch_size
    assert trainer.micro_batch_size == rows, "a carried state belongs to whole batches"
    trainer.sampler = ContiguousSampler(shards.tokens("train"), config.model.block_size, rows)
    trainer.forward = CarriedForward(trainer.model, rows)
    while trainer.progress() < 1:
        if stop:
            raise Stopped(f"stopped at step {trainer.step}; a training with carried state begins anew")
        train_step(trainer)
    trainer.watch.check(trainer.step, config.train.lr)
    if trainer.average is not None:
        with trainer.average.applied() as _:
            weights = {name: tensor.clone() for name, tensor in trainer.model.weights().items()}
        trainer.model.load_weights(weights)
    return trainer.model.eval()


@torch.no_grad()
def stream_bpb(model: LanguageModel, shards: ShardSet, device: Device, *, is_carried: bool, max_tokens: int = 0) -> float:
    """Bits per byte of the validation split cut into a few long streams, read window by window.

    Both settings see the same targets, but for fewer than STREAMS tokens at the end of the split.
    """
    tokens = shards.tokens("val")
    n = min(len(tokens), max_tokens) if max_tokens else len(tokens)
    streams = max(1, min(STREAMS, (n - 1) // (2 * model.block_size)))
    length = (n - 1) // streams
    ids = np.asarray(tokens[0 : streams * length + 1]).astype(np.int64)
    x, y = (torch.from_numpy(part.reshape(streams, length)) for part in (ids[:-1], ids[1:]))
    cache = model.new_cache(streams)
    nats, n_bytes = 0.0, 0
    for start in range(0, length, model.block_size):
        if not is_carried:
            cache = model.new_cache(streams)
        targets = y[:, start : start + model.block_size]
        with device.autocast():
            window = x[:, start : start + model.block_size].to(device.torch)
            loss = model(window, targets.to(device.torch), cache=cache, reduction="none")[1]
        assert loss is not None
        is_text = (targets != shards.eot_id).numpy()
        nats += float(loss.float().cpu().numpy().astype(np.float64)[is_text].sum())
        n_bytes += int(shards.token_bytes[targets.numpy()[is_text]].sum())
    return nats / (math.log(2) * n_bytes)

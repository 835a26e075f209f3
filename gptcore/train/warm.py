"""A warm start: the weights of an earlier run instead of random ones; optimizer, schedule and order of samples are new."""

from __future__ import annotations

import logging
from pathlib import Path

from gptcore.checkpoint import load_checkpoint
from gptcore.config import UserError
from gptcore.models import LanguageModel
from gptcore.shards import ShardSet

log = logging.getLogger(__name__)


def load_initial_weights(model: LanguageModel, directory: Path, shards: ShardSet) -> None:
    """Copy a checkpoint's weights into `model`. Raises UserError when they belong to another vocabulary or shape."""
    checkpoint = load_checkpoint(directory, next(model.parameters()).device)
    if checkpoint.state["vocab_fingerprint"] != shards.fingerprint:
        raise UserError(
            f"train.init_from={directory}: its ids mean other text than those of shard set {shards.id}; use the vocabulary of "
            "that run (vocab.source), or start from random weights"
        )
    ours = {name: tuple(tensor.shape) for name, tensor in model.weights().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in checkpoint.model.items()}
    if ours != theirs:
        raise UserError(
            f"train.init_from={directory}: a model of another shape; copy its `model` section, or start from random weights"
        )
    model.load_weights(checkpoint.model)
    log.info("weights of step %d from %s", checkpoint.state["step"], directory)

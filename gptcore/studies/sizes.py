"""The models that the GPT is compared with, as configs for the same trainer: recurrent ones of its size, and the bigram floor.

Arithmetic only, no torch: `gptcore.train` does the measuring.
"""

from __future__ import annotations

from collections.abc import Callable

from gptcore.config import ExperimentConfig, ModelConfig, with_changes


def estimate_gpt_parameters(model: ModelConfig, vocab_size: int) -> int:
    """12·n_layer·n_embd² in the blocks; embedding, head, positions, biases and gains beside them, as the fields say."""
    C = model.n_embd
    count = 12 * model.n_layer * C**2 + (1 if model.tie else 2) * vocab_size * C
    if model.positions == "learned":
        count += model.block_size * C
    if model.bias:
        count += 9 * model.n_layer * C  # c_attn 3, c_proj 1, c_fc 4, c_proj 1
    n_norms = 2 * model.n_layer + (model.norm_position == "pre")
    per_norm = (1 + (model.bias and model.norm == "layer")) * C if model.norm_gain else 0
    return count + n_norms * per_norm


def estimate_lstm_parameters(n_layer: int, n_embd: int, vocab_size: int) -> int:
    """Four gates of two matrices and two biases a layer, embedding and head beside them."""
    return n_layer * (8 * n_embd**2 + 8 * n_embd) + 2 * vocab_size * n_embd


def nearest_width(count: Callable[[int], int], wanted: int) -> int:
    """The width whose parameters (`count`, which grows with it) are nearest to those wanted; the smaller of two as near."""
    low, high = 2, 4
    while count(high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < wanted else (low, middle)
    return min(low, high, key=lambda width: abs(count(width) - wanted))


# Searched at 0.8 M parameters, 2 M tokens (experiments/LOG.md): one wide layer beats two, and this rate beats lower ones.
LSTM_LAYERS, LSTM_LR = 1, 0.02
# A row of the bigram table moves only when its token occurs, so it takes a larger step; 0.01 to 0.1 end within 0.01 nats.
BIGRAM_LR = 0.03


def baseline_config(config: ExperimentConfig, vocab_size: int) -> ExperimentConfig:
    """The LSTM with as many parameters as the config's GPT (nearest width) and the same batches and steps."""
    rows = config.model.padded_vocab_size or vocab_size
    width = nearest_width(
        lambda n_embd: estimate_lstm_parameters(LSTM_LAYERS, n_embd, rows), estimate_gpt_parameters(config.model, rows)
    )
    return with_changes(
        config,
        model={"family": "lstm", "n_layer": LSTM_LAYERS, "n_embd": width},
        train={"optimizer": "adamw", "lr": LSTM_LR, "parallel": "ddp"},  # only a GPT can be spread
    )


def floor_config(config: ExperimentConfig) -> ExperimentConfig:
    """The bigram table on the same batches."""
    alone = {"processes": 1, "parallel": "ddp"}  # too small to share
    return with_changes(
        config, model={"family": "bigram"}, train={"optimizer": "adamw", "lr": BIGRAM_LR, "weight_decay": 0.0, **alone}
    )

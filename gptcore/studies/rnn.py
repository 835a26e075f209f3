"""The models that the GPT is compared with, as configs for the same trainer: an LSTM of its size, and the bigram floor.

Arithmetic only, no torch: `gptcore.train` does the measuring.
"""

from __future__ import annotations

from gptcore.config import ExperimentConfig, with_changes


def estimate_gpt_parameters(n_layer: int, n_embd: int, vocab_size: int) -> int:
    """12·n_layer·n_embd² in the blocks, embedding and head beside them."""
    return 12 * n_layer * n_embd**2 + 2 * vocab_size * n_embd


def estimate_lstm_parameters(n_layer: int, n_embd: int, vocab_size: int) -> int:
    """Four gates of two matrices and two biases a layer, embedding and head beside them."""
    return n_layer * (8 * n_embd**2 + 8 * n_embd) + 2 * vocab_size * n_embd


def baseline_config(config: ExperimentConfig, vocab_size: int, n_layer: int = 2) -> ExperimentConfig:
    """The LSTM with as many parameters as the config's GPT (nearest width) and the same batches and steps."""
    rows = config.model.padded_vocab_size or vocab_size
    wanted = estimate_gpt_parameters(config.model.n_layer, config.model.n_embd, rows)
    width = 2
    while estimate_lstm_parameters(n_layer, width + 1, rows) <= wanted:
        width += 1
    if estimate_lstm_parameters(n_layer, width + 1, rows) - wanted < wanted - estimate_lstm_parameters(
        n_layer, width, rows
    ):
        width += 1
    return with_changes(config, model={"family": "lstm", "n_layer": n_layer, "n_embd": width})


def floor_config(config: ExperimentConfig) -> ExperimentConfig:
    """The bigram table on the same batches. A table row moves only when its token occurs, so it takes AdamW's larger step."""
    return with_changes(config, model={"family": "bigram"}, train={"adamw_lr": 0.03, "weight_decay": 0.0})

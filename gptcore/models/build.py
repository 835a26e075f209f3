"""The choice of a model by `model.family`."""

from __future__ import annotations

from gptcore.config import ModelConfig, UserError
from gptcore.models.base import LanguageModel
from gptcore.models.bigram import Bigram
from gptcore.models.gpt import GPT
from gptcore.models.mingru import MinGRU
from gptcore.models.ngram import NGram
from gptcore.models.rnn import GRU, LSTM

# Each is made of (config, vocab_size). Their names for people are in gptcore/config/model.py.
MODELS: dict[str, type[LanguageModel]] = {
    "gpt": GPT,
    "lstm": LSTM,
    "gru": GRU,
    "mingru": MinGRU,
    "bigram": Bigram,
    "ngram": NGram,
}


def build_model(config: ModelConfig, vocab_size: int) -> LanguageModel:
    """The model of `model.family` for a vocabulary of `vocab_size` ids, freshly initialised from torch's global seed.

    Raises UserError when `model.padded_vocab_size` does not hold the vocabulary.
    """
    rows = config.padded_vocab_size or vocab_size
    if rows < vocab_size:
        raise UserError(
            f"model.padded_vocab_size={rows} is smaller than the vocabulary of {vocab_size} ids; raise it or leave it out"
        )
    return MODELS[config.family](config, rows)

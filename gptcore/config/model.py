"""`model`: the network. A preset is a set of answers; every answer is a field, so a study can change one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from gptcore.config.base import Section

# The families, by the names that people call them. The class of each is in gptcore/models/build.py.
FAMILIES = {"gpt": "GPT", "lstm": "LSTM", "gru": "GRU", "mingru": "minGRU", "bigram": "bigram", "ngram": "n-gram"}
if TYPE_CHECKING:
    Family = str
else:
    Family = Literal[tuple(FAMILIES)]

# What tells the presets apart. A preset fills the fields that the file leaves unset; the resolved config shows them all.
PRESETS: dict[str, dict[str, Any]] = {
    # Vaswani et al. 2017, its decoder alone, as the notes build it.
    "classic": {
        "norm": "layer",
        "norm_gain": True,
        "norm_position": "post",
        "embedding_norm": False,
        "positions": "learned",
        "activation": "relu",
        "bias": True,
        "tie": False,
        "qk_norm": False,
        "init": "normal",
        "zero_init": False,
        "softcap": 0.0,
    },
    # Radford et al. 2019.
    "gpt2": {
        "norm": "layer",
        "norm_gain": True,
        "norm_position": "pre",
        "embedding_norm": False,
        "positions": "learned",
        "activation": "gelu",
        "bias": True,
        "tie": True,
        "qk_norm": False,
        "init": "normal",
        "zero_init": False,
        "softcap": 0.0,
    },
    # What was measured to learn most per second here (experiments/LOG.md).
    "modern": {
        "norm": "rms",
        "norm_gain": False,
        "norm_position": "pre",
        "embedding_norm": True,
        "positions": "rotary",
        "activation": "relu2",
        "bias": False,
        "tie": False,
        "qk_norm": True,
        "init": "fan_in",
        "zero_init": True,
        "softcap": 0.0,
    },
}
PRESET_FIELDS = tuple(PRESETS["modern"])


class ModelConfig(Section):
    """The network. One contract for all families, so the trainer does not know which it trains."""

    family: Family = Field(
        "gpt",
        description="gpt: decoder-only Transformer; lstm, gru: the RNN baselines; mingru: one that is learnt in parallel; "
        "bigram: the floor of the notes; ngram: counts of `order` tokens, for the rnn study.",
    )
    preset: Literal["classic", "gpt2", "modern"] = Field(
        "modern",
        description="Fills the fields marked [preset] that are not given. classic: the 2017 paper's decoder; "
        "gpt2: GPT-2; modern: what was measured to learn most per second.",
    )
    n_layer: int = Field(
        4, ge=1, le=1000, title="Depth (layers)", description="Depth: number of blocks (gpt, mingru) or layers (lstm, gru)."
    )
    n_head: int = Field(4, ge=1, le=1000, title="Attention heads", description="Attention heads; must divide n_embd.")
    n_embd: int = Field(128, ge=2, le=100_000, title="Width (channels)", description="Width in channels.")
    block_size: int = Field(128, ge=2, le=1 << 20, title="Context (tokens)", description="Maximum context, in tokens.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout probability; 0 is right while training sees each token less than a few times."
    )
    expansion: float = Field(1.5, gt=0, le=16, description="States per channel of mingru.")
    order: int = Field(5, ge=1, le=12, description="Tokens of an n-gram, the predicted one included.")
    padded_vocab_size: int | None = Field(
        None, ge=2, description="Rows of embedding and head; at least the vocabulary's size. None: exactly that size."
    )
    norm: Literal["layer", "rms"] = Field(
        "rms", description="Normalisation over channels: LayerNorm, or by the root mean square alone. [preset]"
    )
    norm_gain: bool = Field(False, description="A learned factor per channel after each normalisation. [preset]")
    norm_position: Literal["pre", "post"] = Field(
        "pre",
        description="pre: before each part, the residual stream stays untouched; post: after each addition (add & norm). "
        "[preset]",
    )
    embedding_norm: bool = Field(True, description="Normalise the token embeddings once, at the bottom. [preset]")
    positions: Literal["learned", "rotary"] = Field(
        "rotary", description="A learned vector per position, or rotation of queries and keys. [preset]"
    )
    activation: Literal["relu", "gelu", "relu2"] = Field(
        "relu2", description="Of the feed-forward part; relu2 is ReLU squared. [preset]"
    )
    bias: bool = Field(False, description="Biases in linear layers and in LayerNorm. [preset]")
    tie: bool = Field(False, description="One matrix as embedding and as head. [preset]")
    qk_norm: bool = Field(True, description="Normalise queries and keys, so attention cannot saturate. [preset]")
    init: Literal["normal", "fan_in"] = Field(
        "fan_in",
        description="normal: N(0, 0.02), output projections smaller with depth (GPT-2); fan_in: uniform by the number of "
        "inputs, head near zero. Recurrent and convolution layers start as torch makes them. [preset]",
    )
    zero_init: bool = Field(True, description="Output projections start at zero: every block starts as the identity. [preset]")
    softcap: float = Field(
        0.0, ge=0, le=1000, description="Logits are bent to stay within ±softcap (c·tanh(x/c)); 0: off. [preset]"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", "modern")
        return (PRESETS.get(preset, {}) if isinstance(preset, str) else {}) | values

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.family == "gpt":
            if self.n_embd % self.n_head:
                raise ValueError(
                    f"model.n_head={self.n_head} does not divide model.n_embd={self.n_embd}; choose a divisor of {self.n_embd}"
                )
            if self.positions == "rotary" and (self.n_embd // self.n_head) % 2:
                raise ValueError(
                    f"model.n_embd / model.n_head = {self.n_embd // self.n_head} is odd; rotary positions need an even head size"
                )
        return self

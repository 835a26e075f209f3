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
# classic: Vaswani et al. 2017, its decoder alone, as the notes build it. gpt2: Radford et al. 2019. modern: what was measured to
# learn most per second here (experiments/LOG.md).
_CHOICES: dict[str, tuple[Any, Any, Any]] = {
    # classic, gpt2, modern
    "norm": ("layer", "layer", "rms"),
    "norm_gain": (True, True, False),
    "norm_position": ("post", "pre", "pre"),
    "embedding_norm": (False, False, True),
    "positions": ("learned", "learned", "rotary"),
    "activation": ("relu", "gelu", "relu2"),
    "bias": (True, True, False),
    "tie": (False, True, False),
    "qk_norm": (False, False, True),
    "init": ("normal", "normal", "fan_in"),
    "zero_init": (False, False, True),
    "softcap": (0.0, 0.0, 0.0),
}
PRESETS: dict[str, dict[str, Any]] = {
    preset: {field: values[column] for field, values in _CHOICES.items()}
    for column, preset in enumerate(("classic", "gpt2", "modern"))
}
PRESET_FIELDS = tuple(_CHOICES)


class ModelConfig(Section):
    """The network. One contract for all families, so the trainer does not know which it trains."""

    family: Family = "gpt"
    """gpt: decoder-only Transformer; lstm, gru: the RNN baselines; mingru: one that is learnt in parallel; bigram: the floor of
    the notes; ngram: counts of `order` tokens, for the rnn study."""
    preset: Literal["classic", "gpt2", "modern"] = "modern"
    """Fills the fields marked [preset] that are not given. classic: the 2017 paper's decoder; gpt2: GPT-2; modern: what was
    measured to learn most per second."""
    n_layer: int = Field(4, ge=1, le=1000, title="Depth (layers)")
    """Depth: number of blocks (gpt, mingru) or layers (lstm, gru)."""
    n_head: int = Field(4, ge=1, le=1000, title="Attention heads", description="Attention heads; must divide n_embd.")
    n_embd: int = Field(128, ge=2, le=100_000, title="Width (channels)", description="Width in channels.")
    block_size: int = Field(128, ge=2, le=1 << 20, title="Context (tokens)", description="Maximum context, in tokens.")
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability; 0 is right while training sees each token less than a few times."""
    expansion: float = Field(1.5, gt=0, le=16, description="States per channel of mingru.")
    order: int = Field(5, ge=1, le=12, description="Tokens of an n-gram, the predicted one included.")
    padded_vocab_size: int | None = Field(None, ge=2)
    """Rows of embedding and head; at least the vocabulary's size. None: exactly that size."""
    norm: Literal["layer", "rms"] = "rms"
    """Normalisation over channels: LayerNorm, or by the root mean square alone. [preset]"""
    norm_gain: bool = Field(False, description="A learned factor per channel after each normalisation. [preset]")
    norm_position: Literal["pre", "post"] = "pre"
    """pre: before each part, the residual stream stays untouched; post: after each addition (add & norm). [preset]"""
    embedding_norm: bool = Field(True, description="Normalise the token embeddings once, at the bottom. [preset]")
    positions: Literal["learned", "rotary"] = "rotary"
    """A learned vector per position, or rotation of queries and keys. [preset]"""
    activation: Literal["relu", "gelu", "relu2"] = "relu2"
    """Of the feed-forward part; relu2 is ReLU squared. [preset]"""
    bias: bool = Field(False, description="Biases in linear layers and in LayerNorm. [preset]")
    tie: bool = Field(False, description="One matrix as embedding and as head. [preset]")
    qk_norm: bool = Field(True, description="Normalise queries and keys, so attention cannot saturate. [preset]")
    init: Literal["normal", "fan_in"] = "fan_in"
    """normal: N(0, 0.02), output projections smaller with depth (GPT-2); fan_in: uniform by the number of inputs, head near
    zero. Recurrent and convolution layers start as torch makes them. [preset]"""
    zero_init: bool = Field(True, description="Output projections start at zero: every block starts as the identity. [preset]")
    softcap: float = Field(0.0, ge=0, le=1000)
    """Logits are bent to stay within ±softcap (c·tanh(x/c)); 0: off. [preset]"""

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

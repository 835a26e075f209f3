"""GPT-2's published weights (Radford et al. 2019), as Hugging Face's safetensors files hold them, into our `gpt2` preset.

    model, config = load_published("model.safetensors", n_head=12)

The published layers multiply from the other side (`Conv1D`: inputs × outputs), so four matrices a block are transposed; the
files leave out the prefix `transformer.` and the tied head, and hold masks that are no weights. Nothing is downloaded here.
"""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from gptcore.config import ModelConfig, UserError
from gptcore.models.gpt import GPT

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASK = re.compile(r"\.attn\.(masked_)?bias$")


def from_published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published names and layout → ours: (outputs, inputs) for every matrix."""
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")
        if name != "lm_head.weight" and not MASK.search(name):
            ours[f"transformer.{name}"] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
    return ours


def load_published(path: str | Path, n_head: int) -> tuple[GPT, ModelConfig]:
    """The model of a published file, in evaluation mode; sizes come from the tensors, `n_head` is not in them.

    Raises UserError when the file is not a GPT-2.
    """
    weights = from_published(load_file(path))
    try:
        vocab_size, n_embd = weights["transformer.wte.weight"].shape
        block_size = len(weights["transformer.wpe.weight"])
    except KeyError as error:
        raise UserError(f"{path}: has no {error.args[0]}; give the model.safetensors of a GPT-2") from None
    # The file has no config: sizes are shapes, the depth is how many blocks have names.
    n_layer = len({name.split(".")[2] for name in weights if name.startswith("transformer.h.")})
    config = ModelConfig(preset="gpt2", n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size)
    model = GPT(config, vocab_size)
    model.load_weights(weights)
    return model.eval(), config

"""A weights file that somebody sent: its header is held against the model before anything is allocated.

safetensors cannot run code, but a file can still name other tensors, shapes or sizes than its config.yaml asks for. A model
is therefore first built without memory (torch's meta device), and only what fits it to the last dimension is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from gptcore.config import ExperimentConfig, UserError
from gptcore.models.build import MODELS, build_model
from gptcore.models.quantized import with_layout
from gptcore.store import raise_refused

MAX_VOCAB = 1 << 24
WAY_OUT = "it is damaged or was tampered with; use another checkpoint"
STORED = {torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3"}
FLOATS = ("F64", "F32", "F16", "BF16")


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises UserError when it is none, or damaged."""
    try:
        return load_file(path, device=device)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); {WAY_OUT}") from None


def check_weights(path: Path, config: ExperimentConfig, vocab_size: object, layout: Any = None) -> None:
    """Does the file hold this config's model for a vocabulary of that size, and nothing else? Reads its header only.

    layout: what is quantized in it, as its state.json says (`gptcore.models.quantized`). Raises UserError naming the first tensor that is missing, unknown, of another shape or not of floats.
    """
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or not 1 <= vocab_size <= MAX_VOCAB:
        raise UserError(f"{path.parent / 'state.json'}: vocab_size={str(vocab_size)[:40]!r} is no vocabulary's; {WAY_OUT}")
    found = _read_header(path)
    if MODELS[config.model.family].has_layers and config.model.n_layer > len(found):  # spares building a thousand layers
        raise UserError(f"{path}: too few tensors for model.n_layer={config.model.n_layer}; {WAY_OUT}")
    with torch.device("meta"):
        model = build_model(config.model, vocab_size)
        try:
            weights = (with_layout(model, layout) if layout is not None else model).weights()
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError):
            raise UserError(f"{path.parent / 'state.json'}: its quantization is none of this model; {WAY_OUT}") from None
    wanted = {name: list(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found or name not in wanted:
            raise UserError(f"{path}: tensor {name[:80]!r} is {'missing' if name in wanted else 'unknown'}; {WAY_OUT}")
        shape, dtype = found[name]
        kinds = (STORED[weights[name].dtype],) if weights[name].dtype in STORED else FLOATS
        is_open = 0 in wanted[name] and len(shape) == len(wanted[name])  # a table as long as what it counted
        if (shape != wanted[name] and not is_open) or dtype not in kinds:
            raise UserError(
                f"{path}: tensor {name!r} is {dtype}{shape}, config.yaml asks for {' or '.join(kinds)} {wanted[name]}; {WAY_OUT}"
            )


def _read_header(path: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and type of every tensor; the library checks that they fill the file exactly, without overlap."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
            return {name: (list(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        if isinstance(error, OSError):
            raise_refused(error, path)
        raise UserError(f"{path}: not a whole safetensors file ({error}); {WAY_OUT}") from None

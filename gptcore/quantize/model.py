"""A trained model → the same model in fewer bits, and a trained checkpoint → a quantized one."""

from __future__ import annotations

import copy
import logging
from dataclasses import asdict, dataclass
from dataclasses import replace as changed
from pathlib import Path

import torch
from torch import Tensor, nn

from gptcore.batches import BatchSampler
from gptcore.checkpoint import (
    Snapshot,
    check_checkpoint,
    checkpoint_path,
    load_checkpoint,
    load_model,
    read_state,
    save_checkpoint,
)
from gptcore.config import ExperimentConfig, UserError
from gptcore.models import LanguageModel
from gptcore.models.quantized import QuantizedEmbedding, QuantizedLinear, empty_layer, fits_int4, layout_of
from gptcore.models.quantized import replace as replace_module
from gptcore.quantize.gptq import collect_hessians, gptq_groups
from gptcore.quantize.qat import fine_tune
from gptcore.quantize.rounding import pack_pairs, quantize_groups, quantize_rows, quantize_rows_fp8
from gptcore.shards import ShardSet
from gptcore.store import content_id, is_committed, read_manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """What becomes of the weights. kind: bf16, int8, int8_dynamic, fp8 or int4.

    `head` and `embedding` are kinds of their own, None for: as the rest (an embedding is never int4 then, but int8: its rows are
    inputs, and it is read a row at a time). algorithm: nearest, gptq or qat, for int4.
    """

    kind: str
    algorithm: str = "nearest"
    group_size: int = 32
    head: str | None = None
    embedding: str | None = None
    only: str | None = None  # quantize modules whose name starts so, nothing else

    def by_rounding(self) -> Method:
        """The same bits chosen without data: what a fine-tuned model gets, and enough to measure size and speed."""
        return changed(self, algorithm="nearest")

    def without_training(self) -> Method:
        """The same, but for fine-tuning, which `quantize` does not do."""
        return self.by_rounding() if self.algorithm == "qat" else self

    def with_parts(self, **parts: str) -> Method:
        """Another head, embedding or choice of modules."""
        return changed(self, **parts)  # type: ignore[arg-type]

    def kind_of(self, name: str, module: nn.Module) -> str:
        """bf16 means: leave it."""
        if self.only is not None and not name.startswith(self.only):
            return "bf16"
        if isinstance(module, nn.Embedding):
            kind = self.embedding or ("int8" if self.kind in ("int4", "int8_dynamic") else self.kind)
        else:
            kind = (self.head if name == "lm_head" else None) or self.kind
        width = module.embedding_dim if isinstance(module, nn.Embedding) else module.in_features
        assert isinstance(width, int)
        return "int8" if kind == "int4" and not fits_int4(width, self.group_size) else kind


METHODS: dict[str, Method] = {
    "bf16": Method("bf16"),
    "int8": Method("int8"),
    "int8-dynamic": Method("int8_dynamic"),
    "fp8": Method("fp8"),
    "int4": Method("int4"),
    "int4-gptq": Method("int4", "gptq"),
    "int4-qat": Method("int4", "qat"),
    "int4-head8": Method("int4", "gptq", head="int8"),
}


def calibration_ids(shards: ShardSet, block_size: int, count: int = 64, seed: int = 0) -> Tensor:
    """`count` windows of the training split, int64 (count, block_size); never of the text that the result is measured on."""
    sampler = BatchSampler(shards.tokens("train"), block_size, seed)
    return torch.from_numpy(sampler.batch(0, min(count, sampler.windows_per_epoch))[0])


@torch.no_grad()
def quantize(
    model: LanguageModel, method: Method, calibration: Tensor | None = None, *, keep_rest: bool = False
) -> LanguageModel:
    """A quantized copy in evaluation mode; the model stays as it is. Everything else becomes bfloat16, but with `keep_rest`.

    calibration: ids (n, T), for algorithm="gptq". Fine-tuning (algorithm="qat") comes before: see `quantize_checkpoint`.
    """
    small = copy.deepcopy(model).eval().requires_grad_(False)
    is_tied = any(
        isinstance(module, nn.Embedding) and module.weight is getattr(getattr(small, "lm_head", None), "weight", None)
        for module in small.modules()
    )
    for stage in stages(small):
        layers = {name: layer for name, layer in stage.items() if method.kind_of(name, layer) != "bf16"}
        hessians: dict[str, Tensor] = {}
        if method.algorithm == "gptq":
            assert calibration is not None, "GPTQ needs calibration ids"
            wanted = {name: layer for name, layer in layers.items() if method.kind_of(name, layer) == "int4"}
            hessians = collect_hessians(small, wanted, calibration.to(next(small.parameters()).device))
        for name, layer in layers.items():
            kind = method.kind_of(name, layer)
            replace_module(small, name, quantized_layer(layer.weight, layer.bias, kind, method, hessians.get(name)))
    tables = {name: module for name, module in small.named_modules() if isinstance(module, nn.Embedding)}
    for name, table in tables.items():
        if not name.endswith("wte"):
            continue  # positions: a thousandth of the weights
        head = getattr(small, "lm_head", None)
        if is_tied and isinstance(head, QuantizedLinear):
            replace_module(small, name, QuantizedEmbedding(head, is_tied=True))
        elif not is_tied and (kind := method.kind_of(name, table)) != "bf16":
            own = quantized_layer(table.weight, None, kind, method, None)
            replace_module(small, name, QuantizedEmbedding(own, is_tied=False))
    return small if keep_rest else small.to(torch.bfloat16)


def stages(model: LanguageModel) -> list[dict[str, nn.Linear]]:
    """The linear layers in the order of the forward pass, those of a block together: they are rounded on the same statistics."""
    found: dict[str, dict[str, nn.Linear]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            parts = name.split(".")
            number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
            found.setdefault(".".join(parts[: number + 1]), {})[name] = module
    return list(found.values())


def quantized_layer(weight: Tensor, bias: Tensor | None, kind: str, method: Method, hessian: Tensor | None) -> QuantizedLinear:
    """One matrix (rows, columns), rounded."""
    rows, columns = weight.shape
    size = method.group_size
    layer = empty_layer({"kind": kind} | ({"group_size": size} if kind == "int4" else {}), columns, rows, bias)
    if kind == "int4":
        q, layer.scale = quantize_groups(weight, size) if hessian is None else gptq_groups(weight, hessian, size)
        layer.weight = pack_pairs(q)
    else:
        layer.weight, layer.scale = (quantize_rows_fp8 if kind == "fp8" else quantize_rows)(weight.float())
    return layer


def quantize_checkpoint(
    checkpoint: Path,
    method: Method,
    out: Path,
    shards: ShardSet | None = None,
    *,
    device: torch.device | str = "cpu",
    calibration_windows: int = 64,
    qat_steps: int = 100,
    config: ExperimentConfig | None = None,
) -> Path:
    """Commit the quantized copy as a checkpoint under `out`; returns its directory. Its optimizer state is empty.

    config: what fine-tuning goes by, the checkpoint's own by default; the copy keeps that in any case.
    The same copy is found again, not made again. Raises UserError for a checkpoint that is quantized already, where GPTQ or
    fine-tuning miss the shards they read, and where another checkpoint is in the copy's place.
    """
    source = load_checkpoint(checkpoint, device)
    origin = origin_id(checkpoint, method, shards, config, calibration_windows, qat_steps)
    if (made := find_made(checkpoint, method, out, shards, origin)) is not None:
        return made
    if method.algorithm == "qat":
        assert shards is not None
        model = fine_tune(source.model, config or source.config, shards, qat_steps, method.group_size).to(device)
        method = method.by_rounding()
    else:
        model = load_model(checkpoint, device)[0]
    ids = None
    if method.algorithm == "gptq":
        assert shards is not None
        ids = calibration_ids(shards, model.block_size, calibration_windows)
    small = quantize(model, method, ids)
    state = {**source.state, "quantization": layout_of(small), "origin": origin}
    tokenizer = checkpoint / "tokenizer.json"
    return save_checkpoint(out, Snapshot(state["step"], small.weights(), {}, state, source.config, tokenizer))


def find_made(checkpoint: Path, method: Method, out: Path, shards: ShardSet | None, origin: str) -> Path | None:
    """What `quantize_checkpoint` committed for the same `origin_id` earlier, verified. Raises UserError as that does, before any work."""
    if "quantization" in read_state(checkpoint):
        raise UserError(f"checkpoint {checkpoint}: quantized already; give the trained one it was made from")
    if method.algorithm != "nearest" and shards is None:
        raise UserError(f"--method with {method.algorithm} reads the training split: give --shards DIR")
    directory = checkpoint_path(out, read_manifest(checkpoint)["step"])
    if not is_committed(directory):
        return None
    check_checkpoint(directory)
    if read_state(directory).get("origin") != origin:
        raise UserError(
            f"--out: {directory} is another checkpoint, or quantized in another way; give another --out, or delete it"
        )
    return directory


def origin_id(
    checkpoint: Path, method: Method, shards: ShardSet | None, config: ExperimentConfig | None, windows: int, qat_steps: int
) -> str:
    """Stands for all that a quantized copy is made from; int4 by rounding and by GPTQ cannot be told apart by their layouts."""
    parts = {"source": read_manifest(checkpoint)["files"], "method": asdict(method)}
    if method.algorithm != "nearest" and shards is not None:
        parts["shards"] = shards.id
        parts["amount"] = windows if method.algorithm == "gptq" else qat_steps
    if method.algorithm == "qat" and config is not None:
        parts["config"] = config.model_dump(mode="json")
    return content_id(parts)

"""Linear layers and tables whose weights are stored in few bits, under the names and in the places of the ones they replace.

Here is how they multiply; what the bits are is chosen in `gptcore.quantize`. Few tokens at a time are limited by reading weights, so
there torch's packed kernels read a quarter or an eighth of the bytes (`_weight_int8pack_mm`, `_weight_int4pack_mm`); many tokens are
limited by arithmetic, so there the weights are unpacked once and multiplied as bfloat16. Activations are bfloat16 for both.

    {"transformer.h.0.attn.c_attn": {"kind": "int4", "group_size": 32}, "lm_head": {"kind": "int8"}, "transformer.wte": {"kind": "tied"}}

is a layout: the `quantization` of a checkpoint's state, from which `with_layout` rebuilds the modules that its tensors fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.models.base import LanguageModel
from gptcore.models.head import Head
from gptcore.models.layers import HAS_TRITON

Layout = dict[str, dict[str, Any]]
BF16 = torch.bfloat16
E4M3 = torch.float8_e4m3fn
Product = Callable[[Tensor], Tensor]
# What the two weights in a byte are, before their scale.
INT4_PAIRS = torch.stack((torch.arange(256) // 16 - 8, torch.arange(256) % 16 - 8), dim=1).to(BF16)


class QuantizedLinear(Head, nn.Module):
    """y = x W^T + b with a stored W (out_features, in_features). Also a table: `rows(idx)` are the embeddings of ids."""

    kind: ClassVar[str]
    few_rows: ClassVar[int]  # up to so many tokens a kernel that reads packed weights is faster than unpacking them
    weight: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(BF16), requires_grad=False)
        self._packed: Any = None  # what a kernel reads, made when it first does on a device

    @property
    def stored_parameters(self) -> int:
        return self.in_features * self.out_features

    def entry(self) -> dict[str, Any]:
        """What a layout says of this module."""
        return {"kind": self.kind}

    def dequantize(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """The float32 weights that the bits stand for, of all or some output rows."""
        raise NotImplementedError

    def rows(self, idx: Tensor) -> Tensor:
        """Rows of the table, bfloat16 (*idx.shape, in_features)."""
        return self.dequantize(idx.flatten()).to(BF16).view(*idx.shape, self.in_features)

    def multiply(self, x: Tensor) -> Tensor:
        """x: (rows, in_features) bfloat16; returns (rows, out_features) bfloat16 or float32, a tensor of its own."""
        # Unpacked for this product and dropped: kept, the weights would take the memory that they were to save.
        return F.linear(x, self.dequantize().to(BF16))

    def kernel(self, rows: int, device: torch.device) -> Product:
        """The function of x that is fastest for so many rows there; as `multiply` otherwise."""
        return self.multiply

    def product(self, rows: int, device: torch.device) -> Product:
        """`forward` of so many rows, (rows, in_features) bfloat16, with all looked up beforehand: at one token everything between the
        kernels runs on cold caches, in each of 50 layers.
        """
        kernel, bias = self.kernel(rows, device), self.bias

        def multiply(x: Tensor) -> Tensor:
            y = kernel(x)
            if bias is not None:
                y.add_(bias)
            return y if y.dtype == BF16 else y.to(BF16)

        return multiply

    def pack_for(self, device: torch.device) -> Any:
        """What the device's kernel reads."""
        return self.weight, self.scale

    def packed(self, device: torch.device) -> Any:
        """`pack_for`, once: a model that only reads many tokens at a time never needs it."""
        if self._packed is None:
            self._packed = self.pack_for(device)
        return self._packed

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features).to(BF16)
        y = self.kernel(len(flat), x.device)(flat)
        if self.bias is not None:
            y.add_(self.bias)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self._packed = None  # made from what is overwritten

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._packed = None  # made for the device that is left
        return super()._apply(fn, recurse)


class Int8Linear(QuantizedLinear):
    """int8 weights, one scale an output row (Dettmers et al. 2022 describe the family)."""

    kind = "int8"
    few_rows = 32

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None = None) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        # A scale an output row: it leaves the sum as one factor, so products stay in integers to the end.
        self.register_buffer("scale", torch.ones(out_features, dtype=BF16))

    def dequantize(self, rows: Tensor | slice = slice(None)) -> Tensor:
        return self.weight[rows].float() * self.scale[rows].float()[:, None]

    def kernel(self, rows: int, device: torch.device) -> Product:
        if rows > self.few_rows:
            return self.multiply
        if device.type == "cuda":
            return narrow_product(self.weight, self.scale) if HAS_TRITON else self.multiply
        if self.in_features % 16:  # the kernel reads sixteen at a time, and past the end of a row where they are fewer
            return self.multiply
        packed = self.packed(device) if rows <= 2 else None
        if packed is None:
            return lambda x: torch._weight_int8pack_mm(x, self.weight, self.scale)
        digits, scale_and_zero, group_size = packed
        multiply = int4_product(digits, scale_and_zero, group_size, self.out_features)
        return lambda x: multiply(torch.cat((x, x), dim=1))

    def pack_for(self, device: torch.device) -> Any:
        """Both hexadecimal digits of each weight for the int4 kernel: w = 16 · high + low, so W x = (16 · high, low) (x, x), exactly.

        The int8 kernel jumps between four rows, the int4 kernel reads its weights from front to back. For a token or two that is faster
        by a quarter although it multiplies twice as often; with vectors of 256 bits it is not. In memory the weights are there twice.
        """
        group_size = next((size for size in (256, 128, 64, 32) if self.in_features % size == 0), None)
        if device.type != "cpu" or group_size is None or torch.backends.cpu.get_cpu_capability() != "AVX512":
            return None
        byte = self.weight.view(torch.uint8)
        # The kernel takes a digit q for q - 8. With its sign bit flipped, the high one of two's complement is just that; to the low one,
        # which is 0…15, the zero point adds the 8 back.
        digits = pack_int4_for_cpu(torch.cat(((byte >> 4) ^ 8, byte & 15), dim=1))
        groups = self.in_features // group_size
        scale = F.pad(self.scale, (0, -self.out_features % 16)).expand(groups, -1)  # (groups, rows)
        scales, zeros = torch.cat((16 * scale, scale)), torch.cat((torch.zeros_like(scale), 8 * scale))
        return digits, torch.stack((scales, zeros), dim=-1), group_size


def narrow_product(weight: Tensor, scale: Tensor) -> Product:
    """With 8-bit weights that a GPU's kernel widens as it reads them."""
    from gptcore.models.kernels import narrow_linear

    return lambda x: narrow_linear(x, weight, scale)


def int4_product(packed: Tensor, scale_and_zero: Tensor, group_size: int, out_features: int) -> Product:
    """With torch's kernel for a CPU, whose rows are padded to sixteens."""
    kernel = torch._weight_int4pack_mm_for_cpu
    if out_features % 16:
        return lambda x: kernel(x, packed, group_size, scale_and_zero)[:, :out_features]
    return lambda x: kernel(x, packed, group_size, scale_and_zero)


def pack_int4_for_cpu(q: Tensor) -> Tensor:
    """(rows, columns) in 0…15 in the order of the CPU's int4 kernel, which takes rows in sixteens: padded with zero weights."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(F.pad(q, (0, 0, 0, -len(q) % 16), value=8).int(), 1)


class Int8DynamicLinear(Int8Linear):
    """int8 weights times int8 activations, whose scale is found anew for each token: integer products, exact in int32."""

    kind = "int8_dynamic"

    def pack_for(self, device: torch.device) -> Any:
        return self.weight, self.scale.float()

    def multiply(self, x: Tensor) -> Tensor:
        weight, scale = self.packed(x.device)
        # A scale a token, not one for all: activations have a few huge channels in a few tokens, and these would leave the
        # others no digits (Dettmers et al. 2022).
        largest = torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True, dtype=torch.float32)
        x_scale = largest.clamp_min_(1e-12).div_(127)  # (rows, 1)
        x8 = x.div(x_scale).round_().to(torch.int8)
        return integer_product(x8, weight).mul(x_scale).mul_(scale)

    def kernel(self, rows: int, device: torch.device) -> Product:
        return self.multiply


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T` of int8 (M, K) and (N, K) in int32. A GPU's kernel wants M above 16 and N, K in eights; others go the long way."""
    if not a.is_cuda:
        return torch._int_mm(a, b.t())
    if a.size(1) % 8 or len(b) % 8:
        return a.double() @ b.double().t()
    padded = F.pad(a, (0, 0, 0, max(0, 17 - len(a))))
    return torch._int_mm(padded, b.t())[: len(a)]


class Int4Linear(QuantizedLinear):
    """Two weights a byte, one scale for `group_size` neighbours of a row: w = (q - 8) · scale with q in 0…15."""

    kind = "int4"
    few_rows = 64

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None = None, *, group_size: int = 32) -> None:
        super().__init__(in_features, out_features, bias)
        assert fits_int4(in_features, group_size), (in_features, group_size)
        self.group_size = group_size
        self.register_buffer("weight", torch.full((out_features, in_features // 2), 0x88, dtype=torch.uint8))
        # A scale a group: with 16 values one outlier in a row would cost all others their digits.
        self.register_buffer("scale", torch.ones(out_features, in_features // group_size, dtype=BF16))

    def entry(self) -> dict[str, Any]:
        return {"kind": self.kind, "group_size": self.group_size}

    def unpack(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """q of all or some rows, uint8 (rows, in_features); the first of two neighbours is in the upper half of its byte."""
        pairs = self.weight[rows]
        return torch.stack((pairs >> 4, pairs & 15), dim=-1).flatten(1)

    def dequantize(self, rows: Tensor | slice = slice(None)) -> Tensor:
        q = self.unpack(rows).float().unflatten(1, (-1, self.group_size)) - 8  # (rows, groups, group_size)
        return (q * self.scale[rows].float()[..., None]).flatten(1)

    def rows(self, idx: Tensor) -> Tensor:
        if idx.is_cuda:
            return super().rows(idx)
        # The same in half as many steps: for one token each takes longer to call than to do.
        q = F.embedding(F.embedding(idx, self.weight).int(), INT4_PAIRS)  # (*idx.shape, in_features / 2, 2)
        scale = F.embedding(idx, self.scale)[..., None]  # (*idx.shape, groups, 1)
        return (q.view(*idx.shape, -1, self.group_size) * scale).flatten(-2)

    @property
    def _fits_gpu(self) -> bool:
        return not (self.in_features % 32 or self.out_features % 8)

    def kernel(self, rows: int, device: torch.device) -> Product:
        if rows > self.few_rows or (device.type == "cuda" and not self._fits_gpu):
            return self.multiply
        packed, scale_and_zero = self.packed(device)
        if device.type == "cuda":
            return lambda x: torch._weight_int4pack_mm(x, packed, self.group_size, scale_and_zero)
        return int4_product(packed, scale_and_zero, self.group_size, self.out_features)

    def pack_for(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Weights in the order of the device's kernel, and (groups, rows, 2) scales and zeros."""
        scale = self.scale.t().contiguous()  # (groups, rows)
        if device.type == "cuda":
            tiles = next(t for t in (8, 4, 2) if self.in_features % (16 * t) == 0)
            packed = torch.ops.aten._convert_weight_to_int4pack(self.weight, tiles)
        else:
            packed = pack_int4_for_cpu(self.unpack())
            scale = F.pad(scale, (0, -self.out_features % 16))
        return packed, torch.stack((scale, torch.zeros_like(scale)), dim=-1).to(BF16)


def fits_int4(in_features: int, group_size: int) -> bool:
    return group_size in (32, 64, 128, 256) and in_features % group_size == 0


class Float8Linear(QuantizedLinear):
    """e4m3 weights with one scale an output row; on GPUs with FP8 the activations of many tokens too, one scale a token."""

    kind = "fp8"
    few_rows = 32

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None = None) -> None:
        super().__init__(in_features, out_features, bias)
        # Kept as bytes: `module.to(dtype)` would convert a floating type, and indexing is not made for this one.
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(out_features, dtype=BF16))

    def dequantize(self, rows: Tensor | slice = slice(None)) -> Tensor:
        return self.weight[rows].view(E4M3).float() * self.scale[rows].float()[:, None]

    def kernel(self, rows: int, device: torch.device) -> Product:
        if not has_fp8(device):
            return self.multiply
        if HAS_TRITON and rows <= self.few_rows:
            return narrow_product(self.weight.view(E4M3), self.scale)
        return self.multiply if self.in_features % 16 or self.out_features % 16 else self.multiply_narrow

    def multiply_narrow(self, x: Tensor) -> Tensor:
        """With activations in e4m3, too, one scale a token."""
        x_scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / torch.finfo(E4M3).max  # (rows, 1)
        x8 = F.pad((x.float() / x_scale).to(E4M3).view(torch.uint8), (0, 0, 0, -len(x) % 16)).view(E4M3)
        x_scale = F.pad(x_scale, (0, 0, 0, -len(x) % 16), value=1.0)
        y = torch._scaled_mm(
            x8,
            self.weight.view(E4M3).t(),
            scale_a=x_scale,
            scale_b=self.scale.float()[None],
            out_dtype=BF16,
            use_fast_accum=True,
        )
        return y[: len(x)]


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies e4m3 numbers itself: GPUs from compute capability 8.9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


class QuantizedEmbedding(nn.Module):
    """A look-up table over quantized rows: its own, or those of the head it is tied to (stored once, under the head's name)."""

    def __init__(self, table: QuantizedLinear, *, is_tied: bool) -> None:
        super().__init__()
        self.is_tied = is_tied
        # In a tuple: not a child, so a tied one is neither saved nor moved twice.
        self._table = (table,)
        if not is_tied:
            self.table = table

    def entry(self) -> dict[str, Any]:
        return {"kind": "tied"} if self.is_tied else self._table[0].entry()

    def forward(self, idx: Tensor) -> Tensor:
        return self._table[0].rows(idx)


KINDS: dict[str, type[QuantizedLinear]] = {
    layer.kind: layer for layer in (Int8Linear, Int8DynamicLinear, Int4Linear, Float8Linear)
}


def empty_layer(entry: dict[str, Any], in_features: int, out_features: int, bias: Tensor | None) -> QuantizedLinear:
    """The layer of a layout's entry, its tensors still to be filled."""
    options = {key: value for key, value in entry.items() if key != "kind"}
    return KINDS[entry["kind"]](in_features, out_features, bias, **options)


def with_layout(model: LanguageModel, layout: Layout) -> LanguageModel:
    """Replace the named modules by empty quantized ones and everything else by bfloat16, in place; its weights come next."""
    # Rounded numbers have no gradient; whoever fine-tunes does so before rounding (gptcore.quantize.qat).
    model.requires_grad_(False).to(BF16)
    for name, entry in layout.items():
        old = model.get_submodule(name)
        if isinstance(old, nn.Embedding):
            is_tied = entry["kind"] == "tied"
            rows, columns = old.weight.shape
            table = model.get_submodule("lm_head") if is_tied else empty_layer(entry, columns, rows, None)
            assert isinstance(table, QuantizedLinear), f"{name} is tied to a head that is not quantized"
            replace(model, name, QuantizedEmbedding(table, is_tied=is_tied))
        else:
            assert isinstance(old, nn.Linear), name
            replace(model, name, empty_layer(entry, old.in_features, old.out_features, old.bias))
    return model


def layout_of(model: LanguageModel) -> Layout:
    """The layout that rebuilds this model's quantized modules; heads before the tables that are tied to them."""
    found = {
        name: module.entry()
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear | QuantizedEmbedding) and not name.endswith(".table")
    }
    return dict(sorted(found.items(), key=lambda item: item[1]["kind"] == "tied"))


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in another's place; a head takes over the bound of the logits."""
    old = model.get_submodule(name)
    if isinstance(old, Head) and isinstance(module, Head):
        module.softcap = old.softcap
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)

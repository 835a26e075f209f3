"""A model over several processes: whole on each (DDP), or its weights spread over them (FSDP2), compiled block by block.

A compiled block hands over its gradients when its own backward pass is done, so they travel while the blocks below still compute.
The whole model as one compiled graph would hand over all of them at the end, with nothing left to compute beside the exchange.
(DDP: Li et al. 2020; FSDP: Zhao et al. 2023, in its second form, `torch.distributed.fsdp.fully_shard`.)
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from gptcore.config import UserError
from gptcore.device import Device
from gptcore.models import LanguageModel
from gptcore.models.gpt import GPT
from gptcore.ranks import Ranks, is_spread


def spread(model: LanguageModel, device: Device, ranks: Ranks) -> None:
    """Move the model to the device, in place, its rows spread over all processes: a block is whole only while it computes.

    In bf16 the weights travel in 16 bits; gradients are summed in float32. Raises UserError for what cannot be spread.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not isinstance(model, GPT):
        raise UserError("train.parallel=fsdp: needs model.family=gpt; use train.parallel=ddp")
    if device.precision == "fp8":
        raise UserError(
            "train.parallel=fsdp: does not go with train.precision=fp8; use train.precision=bf16, or train.parallel=ddp"
        )
    mesh = init_device_mesh(device.torch.type, (ranks.count,))
    short = torch.bfloat16 if device.precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=short, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)  # tables, head and last norm: used at both ends of a pass


def distribute(model: LanguageModel, compiled: Any) -> Any:
    """What the step calls, with several processes: the spread model itself, or `compiled` (the model, perhaps compiled) under DDP."""
    if any(map(is_spread, model.parameters())):
        return model
    from torch.nn.parallel import DistributedDataParallel

    # Dynamo would cut each compiled part once more, at the borders of DDP's buckets.
    torch._dynamo.config.optimize_ddp = False
    # Buffers are tables that never change; gradients live in the buckets that travel.
    return DistributedDataParallel(compiled, broadcast_buffers=False, gradient_as_bucket_view=True)


def compile_parts(model: GPT) -> None:
    """The embedding, each block, and the head with its loss, compiled in place.

    The embedding too: its gradient, the last to be ready and so waited for, is sorted first where it is not compiled.
    """
    model.transformer.embed = torch.compile(model.transformer.embed)  # type: ignore[method-assign]
    for block in model.transformer.h:
        block.compile()
    model.read_out = torch.compile(model.read_out)  # type: ignore[method-assign]


def uncompile_parts(model: LanguageModel) -> None:
    if are_parts_compiled(model):
        for block in model.transformer.h:  # type: ignore[union-attr]
            block._compiled_call_impl = None  # where nn.Module.compile puts it
        del model.read_out, model.transformer.embed  # type: ignore[union-attr]


def are_parts_compiled(model: LanguageModel) -> bool:
    return "read_out" in vars(model)


def uncompiled(model: LanguageModel) -> AbstractContextManager[object]:
    """Inside, calls of `model` itself do not compile: other shapes than a step's would be compiled anew."""
    return torch.compiler.set_stance("force_eager") if are_parts_compiled(model) else nullcontext()


def put_away(model: LanguageModel) -> None:
    """Let go of what a forward pass without a backward pass has gathered: a spread model keeps its outermost weights, and would not
    see that its parts have changed since."""
    if hasattr(model, "reshard"):  # FSDP2
        model.reshard()  # type: ignore[operator]


def exchanging(forward: Any, ranks: Ranks, is_last: bool) -> AbstractContextManager[object]:
    """Around a micro-step: processes exchange gradients once a step, with the last micro-batch."""
    if ranks.count == 1:
        return nullcontext()
    if hasattr(forward, "set_requires_gradient_sync"):  # FSDP2
        forward.set_requires_gradient_sync(is_last)
        return nullcontext()
    no_sync: AbstractContextManager[object] = nullcontext() if is_last else forward.no_sync()
    return no_sync

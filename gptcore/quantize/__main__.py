"""A quantized copy of a checkpoint, which loads, generates and is evaluated like any other.

python -m gptcore.quantize CHECKPOINT --method int8|int8-dynamic|int4|int4-gptq|int4-qat|int4-head8|fp8|bf16 [--shards DIR] --out DIR [train.field=value …]

Overrides say how the work is done here, such as train.device=cpu; the copy keeps the config that its weights were trained with.
"""

from __future__ import annotations

import time
from typing import Any

from gptcore.checkpoint import load_checkpoint
from gptcore.config import UserError, with_overrides
from gptcore.device import choose_device
from gptcore.entry import process_parser, recording, run_process
from gptcore.quantize.model import METHODS, find_made, origin_id, quantize_checkpoint
from gptcore.shards import ShardSet


def main(argv: list[str]) -> dict[str, Any]:
    parser = process_parser(__doc__, "checkpoint", "a step_NNNNNN directory")
    parser.add_argument("--method", default="int8", help=f"one of {', '.join(METHODS)} (default: int8)")
    parser.add_argument("--windows", type=int, default=64, help="training windows that GPTQ calibrates on (default: 64)")
    parser.add_argument("--qat-steps", type=int, default=100, help="steps of fine-tuning before int4-qat (default: 100)")
    parser.add_argument("overrides", nargs="*", metavar="train.field=value", help="changes to the checkpoint's own config")
    args = parser.parse_intermixed_args(argv)
    if args.out is None:
        raise UserError("quantize needs --out DIR, where the new checkpoint goes")
    if args.method not in METHODS:
        raise UserError(f"--method {args.method}: unknown; choose one of {', '.join(METHODS)}")
    for name in ("windows", "qat_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    for override in args.overrides:
        if not override.startswith("train."):
            raise UserError(f"override {override!r}: the weights are there already; only train.field=value can be changed")
    start = time.perf_counter()
    shards = None if args.shards is None else ShardSet.open(args.shards)
    source = load_checkpoint(args.checkpoint)
    config = with_overrides(source.config, args.overrides, f"checkpoint {args.checkpoint}")
    device = choose_device(config.train.device, "fp32")
    what = (args.checkpoint, METHODS[args.method], args.out / "checkpoints", shards)
    amounts = {"calibration_windows": args.windows, "qat_steps": args.qat_steps}
    own = config if args.overrides else None
    # Refuses what cannot be, before a journal says that it failed.
    find_made(*what, origin_id(args.checkpoint, METHODS[args.method], shards, own, args.windows, args.qat_steps))
    with recording(args.out, args.run, args.parent) as journal:
        made = quantize_checkpoint(*what, device=device.torch, config=own, **amounts)
        before, after = ((path / "model.safetensors").stat().st_size for path in (args.checkpoint, made))
        result = {
            "checkpoint": str(made),
            "method": args.method,
            "size_mib": after / 2**20,
            "size_ratio": after / before,
            "seconds": time.perf_counter() - start,
        }
        journal.params({"method": args.method, "checkpoint": str(args.checkpoint)})
        journal.metrics(
            {"quant/size_mib": result["size_mib"]}, tokens_seen=source.state["tokens_seen"], step=source.state["step"]
        )
    return result


if __name__ == "__main__":
    raise SystemExit(run_process(main))

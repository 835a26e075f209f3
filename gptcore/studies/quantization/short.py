"""What fewer bits a weight cost and give: size, memory, speed, bits per byte on the same tokens.

    gptloom study quantization                                                                  # the study
    python -m gptcore.studies.quantization CONFIG.yaml --shards DIR --out DIR --checkpoint DIR     # its short form, int8 alone

A cell is one method on one trained model (quantization_cell); quantization_summary says what they gave together.
"""

from __future__ import annotations

from typing import Any

from safetensors.torch import save_file

from gptcore.checkpoint import load_model
from gptcore.device import choose_device
from gptcore.entry import run_process
from gptcore.evaluate import evaluate_loss
from gptcore.quantize import METHODS, quantize
from gptcore.studies import Study
from gptcore.studies.quantization.cell import QuantizationOptions, measure_cell
from gptcore.studies.quantization.summary import summarize
from gptcore.studies.short import Outcome, Subject, run_study
from gptcore.studies.speed import measure_decoding

DECODE_TOKENS = 100


def measure(subject: Subject) -> Outcome:
    repeats = subject.config.studies.repeats
    device = choose_device(subject.config.train.device, "fp32")
    model, _ = load_model(subject.checkpoint, device.torch)
    arms = {"fp32": model, "int8": quantize(model, METHODS["int8"])}
    n = min(DECODE_TOKENS, model.block_size)
    rows: list[dict[str, Any]] = []
    for weights, arm in arms.items():
        path = subject.out / f"model_{weights}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in arm.weights().items()}, path)
        decoding = measure_decoding(arm, device, 1, n, repeats)
        bpb = evaluate_loss(arm, subject.shards, device, subject.config.evaluate.batch_size).bpb
        rows.append(
            {
                "weights": weights,
                "size_mib": path.stat().st_size / 2**20,
                "val_bpb": bpb,
                "bpb_delta": bpb - rows[0]["val_bpb"] if rows else 0.0,
                "tok_per_sec": 1e3 * n / decoding.median,
                "tok_per_sec_low": 1e3 * n / decoding.high,
                "tok_per_sec_high": 1e3 * n / decoding.low,
                "n": repeats,
            }
        )
        if weights == "fp32":
            path.unlink()  # the checkpoint has it already
    full, int8 = rows
    conclusion = (
        f"int8 weights take {100 * int8['size_mib'] / full['size_mib']:.0f} % of the bytes, cost {int8['bpb_delta']:+.4f} bits per byte "
        f"and decode at {int8['tok_per_sec'] / full['tok_per_sec']:.2f} times the speed of fp32 "
        f"({int8['tok_per_sec']:.0f} against {full['tok_per_sec']:.0f} tok/s at batch 1, n={repeats})."
    )
    metrics = {
        "quant/size_mib": int8["size_mib"],
        "quant/bpb_delta": int8["bpb_delta"],
        "quant/tok_per_sec": int8["tok_per_sec"],
        "quant/fp32_tok_per_sec": full["tok_per_sec"],
    }
    return Outcome(rows, conclusion, metrics, files=("model_int8.safetensors",))


STUDY = Study("Quantization", QuantizationOptions, measure_cell, summarize, version=2)


def main(argv: list[str]) -> dict[str, Any]:
    return run_study("quantization", __doc__, measure, argv)


if __name__ == "__main__":
    raise SystemExit(run_process(main))

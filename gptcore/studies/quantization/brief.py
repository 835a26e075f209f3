"""What `gptloom run` shows of the quantization study: its own model in 8 bits beside what was trained."""

from __future__ import annotations

from gptcore.studies import Brief, Results


def brief(results: Results) -> Brief:
    """A row of the trained weights and one of int8, both measured in the same cell, in turns."""
    full, int8 = rows = results.cells[0]["tables"]["beside"]
    conclusion = (
        f"int8 weights take {100 * int8['size_mib'] / full['size_mib']:.0f} % of the bytes, cost {int8['bpb_delta']:+.4f} bits per byte "
        f"and decode at {int8['tok_per_sec'] / full['tok_per_sec']:.2f} times the speed of fp32 "
        f"({int8['tok_per_sec']:.0f} against {full['tok_per_sec']:.0f} tok/s at batch 1, n={int8['n']})."
    )
    metrics = {
        "quant/size_mib": int8["size_mib"],
        "quant/bpb_delta": int8["bpb_delta"],
        "quant/tok_per_sec": int8["tok_per_sec"],
        "quant/fp32_tok_per_sec": full["tok_per_sec"],
    }
    return Brief("int8 weights", rows, conclusion, metrics, "median (fastest–slowest)")

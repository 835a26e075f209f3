"""What `gptloom run` shows of the accumulation study: its own batch in one and in several micro-steps."""

from __future__ import annotations

from gptcore.studies import Brief, Results


def brief(results: Results) -> Brief:
    """A row for each number of micro-steps: gradient against the one-step gradient, both in fp32; activations kept; tokens a second."""
    measured = [row for cell in results.cells for row in cell["rows"]]
    exact = [row for row in measured if row["kind"] == "exactness" and row["precision"] == "fp32" and row["method"] == "ours"]
    drift = {row["micro_steps"]: row["drift"] for row in exact}
    rows = [
        {
            "grad_accum_steps": row["micro_steps"],
            "micro_batch_size": row["micro_batch_size"],
            "grad_difference": drift[row["micro_steps"]],
            "tok_per_sec": row["tok_per_sec"],
            "tok_per_sec_low": row["tok_per_sec_min"],
            "tok_per_sec_high": row["tok_per_sec_max"],
            "peak_mib": row["peak_mib"],
            "n": row["repeats"],
        }
        for row in measured
        if row["kind"] == "economy"
    ]
    one, many = rows
    memory, speed = many["peak_mib"] / one["peak_mib"], many["tok_per_sec"] / one["tok_per_sec"]
    conclusion = (
        f"{many['grad_accum_steps']} micro-steps of {many['micro_batch_size']} sequences give the gradient of one batch of "
        f"{one['micro_batch_size']} to a relative difference of {many['grad_difference']:.1e}, with {100 * memory:.0f} % of the memory "
        f"for activations and {speed:.2f} times the speed (n={many['n']})."
    )
    metrics = {
        "accumulation/grad_difference": many["grad_difference"],
        "accumulation/memory_ratio": memory,
        "accumulation/speed_ratio": speed,
    }
    return Brief("Gradient accumulation", rows, conclusion, metrics, "median (fastest–slowest)")

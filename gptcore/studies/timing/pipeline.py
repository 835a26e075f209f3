"""The map of everything: raw text to report in one process, each part on one clock.

The process is warm, the home is empty. What a pipeline run adds (starting processes, Prefect, MLflow) is in that run's timing.json.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptcore import corpus, vocab
from gptcore.checkpoint import load_model
from gptcore.entry import StopFlag
from gptcore.evaluate import bootstrap_bpb, evaluate_loss
from gptcore.generate import generate
from gptcore.journal import Journal
from gptcore.report.study import figure, table, write_study_page
from gptcore.shards import ShardSet, write_shards
from gptcore.studies import Bench, Cell, CellResult
from gptcore.studies.timing.sections import label, sections, trains
from gptcore.timing import MapClock
from gptcore.train import build_trainer, preflight, train_loop, train_step


def measure_pipeline(cell: Cell, bench: Bench) -> CellResult:
    """One whole pipeline from an empty home: rows of path, own seconds, calls, processor seconds.

    Raises RuntimeError when the sections do not add up to the wall time within `options.tolerance`.
    """
    home = bench.out / "home"
    _lend_downloads(bench.home, home)
    _warm_up(cell, bench)
    clock = MapClock(bench.device.synchronize)
    memory: list[dict[str, Any]] = []
    began, cpu_began = time.time(), time.process_time()  # another clock than the map's
    with clock.phase("pipeline"):
        _run(cell, home, clock, lambda: _note(memory, clock, began, bench))
    wall, cpu = time.time() - began, time.process_time() - cpu_began
    shutil.rmtree(home)  # a symbolic link in it is not followed
    total = sum(clock.paths.values())
    check_sum(total, wall, cell.options.tolerance)
    rows = [
        {
            "kind": "pipeline",
            "section": label(path),
            "seconds": seconds,
            "share": seconds / total,
            "calls": clock.calls[path],
            "cpu_seconds": clock.cpu_seconds[path],
            "trains": trains(path),
        }
        for path, seconds in clock.paths.items()
    ]
    training = sum(seconds for path, seconds in clock.paths.items() if trains(path))
    facts = {
        "wall_seconds": wall,
        "mapped_seconds": total,
        "not_training": 1 - training / total,
        "cpu_seconds": cpu,
        "threads": torch.get_num_threads(),
    }
    metrics = {f"timing/{key}": float(value) for key, value in facts.items()}
    return CellResult(rows, {"facts": [{"kind": "pipeline", **facts}], "memory": memory}, metrics)


def _warm_up(cell: Cell, bench: Bench) -> None:
    """A step whose libraries are then loaded and kernels chosen: else the first seed would pay for that alone."""
    trainer = build_trainer(cell.config, bench.shards)
    preflight(trainer)
    train_step(trainer)


def check_sum(total: float, wall: float, tolerance: float) -> None:
    """Raises RuntimeError unless the sections' seconds are the wall's, measured by another clock."""
    if abs(total / wall - 1) > tolerance:
        raise RuntimeError(
            f"the sections add up to {1e3 * total:.2f} of {1e3 * wall:.2f} ms: more than {100 * tolerance:.0f} % are missing or double"
        )


def _run(cell: Cell, home: Path, clock: MapClock, note: Callable[[], None]) -> None:
    config = cell.config
    with clock.phase("ingest"):
        documents = corpus.build_corpus(config.data, home)
        note()
    with clock.phase("vocabulary"):
        vocabulary = vocab.build_vocab(config.vocab, documents, home)
        note()
    with clock.phase("shards"):
        shards = ShardSet.open(write_shards(documents, vocabulary, home, config.model.block_size))
        note()
    with clock.phase("train"):
        with clock.phase("build the model"):
            trainer = build_trainer(config, shards)
        with clock.phase("preflight and compile"):
            preflight(trainer)
        trainer.clock = clock
        with sections(trainer.model, clock):
            journal = Journal(home / "train")
            journal.open("map")
            trained = train_loop(trainer, journal, home / "train", StopFlag())
            journal.close()
        note()
    with clock.phase("evaluate"):
        with clock.phase("load"):
            model, _ = load_model(Path(trained["checkpoint"]), trainer.device.torch)
        with sections(model, clock):
            evaluation = evaluate_loss(model, shards, trainer.device, config.evaluate.batch_size)
        with clock.phase("interval"):
            bootstrap_bpb(evaluation, config.evaluate.bootstrap, config.evaluate.seed)
        note()
    with clock.phase("samples"), sections(model, clock):
        start = torch.full((1, 1), shards.eot_id, dtype=torch.int64, device=trainer.device.torch)
        rng = torch.Generator(trainer.device.torch).manual_seed(config.evaluate.seed)
        for _ in range(config.evaluate.samples):
            generate(model, start, config.evaluate.sample_tokens, rng)
        note()
    with clock.phase("report"):
        _write_report(home, trained)
        note()


def _write_report(home: Path, trained: dict[str, Any]) -> None:
    """A page with a plot and a table: what any report costs."""
    import pandas as pd
    import plotly.graph_objects as go

    frame = pd.DataFrame([{key: str(value) for key, value in trained.items()}])
    block = table("result", frame, "of the mapped run")
    plot = figure(go.Figure(go.Bar(x=[1], y=[1])), "plot", "", alt="")
    write_study_page(
        home / "report.html",
        title="map",
        question="",
        conclusion="",
        findings=[],
        blocks=[block, plot],
        cells=[],
        tables=[],
        setup={},
        config_text="",
        command="",
        footer="",
    )


def _lend_downloads(home: Path, own: Path) -> None:
    """What was fetched before is not fetched again: the map is of this machine, not of a network."""
    (own / "data").mkdir(parents=True)
    (home / "data" / "downloads").mkdir(parents=True, exist_ok=True)
    (own / "data" / "downloads").symlink_to((home / "data" / "downloads").resolve())


def _note(memory: list[dict[str, Any]], clock: MapClock, began: float, bench: Bench) -> None:
    last = list(clock.paths)[-1] if clock.paths else ("start",)
    memory.append(
        {
            "kind": "pipeline",
            "seconds": time.time() - began,
            "mib": resident_mib(bench),
            "after": last[1] if len(last) > 1 else last[0],
        }
    )


def resident_mib(bench: Bench) -> float:
    """Memory held now: on a GPU the allocator's, else the process's resident set (Linux; 0 elsewhere is an error there)."""
    if bench.device.is_cuda:
        return torch.cuda.memory_allocated() / 2**20
    import psutil

    return float(psutil.Process().memory_info().rss) / 2**20

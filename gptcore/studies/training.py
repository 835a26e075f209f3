"""Trainings that studies share: the same config on the same shards is trained once, and resumed where it was stopped.

Each has a folder `home/studies/trainings/<key>` with checkpoints, a journal and, once it is over, result.json.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptcore import NUMERICS_VERSION
from gptcore.checkpoint import check_checkpoint, step_directories, step_of
from gptcore.config import ExperimentConfig, UserError, write_yaml
from gptcore.device import choose_device
from gptcore.journal import FILE_NAME, Journal, read_journal
from gptcore.locks import take_lock
from gptcore.shards import ShardSet
from gptcore.store import content_id, read_json, write_json
from gptcore.train import build_trainer, preflight, resume, train_loop
from gptcore.train.saving import checkpoints_of

log = logging.getLogger(__name__)

RESULT = "result.json"


@dataclass(frozen=True)
class Trained:
    """A finished training. `folder/checkpoints` holds as many checkpoints as train.keep_checkpoints says."""

    folder: Path
    checkpoint: Path  # the last one, or the best with train.select=best
    result: dict[str, Any]  # what train_loop returned: val_loss, val_bpb, parameters, tokens_seen, seconds, …

    def curve(self, key: str = "val/bpb") -> list[tuple[int, float, float]]:
        """(tokens_seen, training seconds so far, value) of a metric, in order.

        Seconds are of steps alone: tokens ÷ perf/tok_per_sec, summed over the reports. Points between two reports are
        interpolated.
        """
        seconds, last_tokens = 0.0, 0
        points: dict[int, float] = {}
        clock: list[tuple[int, float]] = [(0, 0.0)]
        for record in read_journal(self.folder / FILE_NAME)[0]:
            if record["kind"] != "metrics":
                continue
            tokens, values = record["tokens_seen"], record["values"]
            if "perf/tok_per_sec" in values and tokens > last_tokens:
                seconds += (tokens - last_tokens) / values["perf/tok_per_sec"]
                last_tokens = tokens
                clock.append((tokens, seconds))
            if key in values:
                points[tokens] = values[key]
        return [(tokens, _interpolated(clock, tokens), value) for tokens, value in sorted(points.items())]


class _Both(Journal):
    """Metrics go to the training's own journal and to the one of the cell that asked for it."""

    def __init__(self, own: Journal, cell: Journal) -> None:
        self._own, self._cell = own, cell

    def metrics(self, values: Mapping[str, float], *, tokens_seen: int, step: int = 0) -> None:
        self._own.metrics(values, tokens_seen=tokens_seen, step=step)
        self._cell.metrics(values, tokens_seen=tokens_seen, step=step)


def train(config: ExperimentConfig, shards: ShardSet, home: Path, journal: Journal, stop: Any) -> Trained:
    """Train, go on, or take what is there. `stop` is true when it is time to save a checkpoint and leave (raises Stopped)."""
    device = choose_device(config.train.device, config.train.precision)
    key = content_id(
        {
            "config": config.model_dump(mode="json", exclude={"name", "data", "vocab", "studies"}),
            "shards": shards.id,
            "numerics": NUMERICS_VERSION,
            "torch": torch.__version__,
            "device": device.name,
            "precision": device.precision,
        }
    )
    folder = home / "studies" / "trainings" / key
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        for line in read_journal(folder / FILE_NAME)[0]:  # what an earlier attempt or another cell has told
            if line["kind"] == "metrics":
                journal.metrics(line["values"], tokens_seen=line["tokens_seen"], step=line["step"])
        if (result := _result_of(folder)) is None:
            write_yaml(config, folder / "config.yaml")
            own = Journal(folder)
            own.open(f"training-{key}")
            trainer = build_trainer(config, shards)
            memory = resume(trainer, folder)
            log.info("%s", preflight(trainer).line(device.name))
            result = train_loop(trainer, _Both(own, journal), folder, stop, memory)
            own.close()
            write_json(folder / RESULT, result)
            result = read_json(folder / RESULT)
    return Trained(folder, Path(result["checkpoint"]), result)


def _result_of(folder: Path) -> dict[str, Any] | None:
    """What a training that is over has told, whose checkpoint is still there and whole; None for any other: it goes on from what there is.

    Raises OSError for what cannot be read.
    """
    if not (folder / RESULT).exists():
        return None
    try:
        result = read_json(folder / RESULT)
        checkpoint = checkpoints_of(folder).resolve() / Path(result["checkpoint"]).name  # the home may have moved
    except UserError as error:
        log.warning("its end is trained once more (%s)", error)
        return None
    try:
        check_checkpoint(checkpoint)
    except UserError as error:
        log.warning("trained once more (%s)", str(error).partition(";")[0])
        # With train.select=best it is not the last one, and those after it would ask for it.
        for later in step_directories(checkpoint.parent):
            if step_of(later) > step_of(checkpoint):
                shutil.rmtree(later)
        return None
    return result | {"checkpoint": str(checkpoint)}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time trains the same thing."""
    fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        take_lock(fd)
        yield
    finally:
        os.close(fd)


def _interpolated(clock: list[tuple[int, float]], tokens: int) -> float:
    before = max((point for point in clock if point[0] <= tokens), key=lambda point: point[0])
    after = min((point for point in clock if point[0] >= tokens), key=lambda point: point[0], default=before)
    if after[0] == before[0]:
        return before[1]
    return before[1] + (tokens - before[0]) / (after[0] - before[0]) * (after[1] - before[1])

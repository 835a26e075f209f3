"""Room 7: checkpoints. A committed directory that holds all a run needs to go on, and all a model needs to be used.

    step_001000/{model.safetensors, optimizer.safetensors, state.json, config.yaml, tokenizer.json, manifest.json, COMMITTED}

safetensors for tensors, JSON for the rest, no pickle. Loading verifies every file. A `Snapshot` is a checkpoint that is still in
memory: taking it holds the training up, writing it does not have to (gptcore/train/writer.py).
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptcore.config import ExperimentConfig, UserError, load_written, write_yaml
from gptcore.models import LanguageModel, build_model
from gptcore.models.quantized import with_layout
from gptcore.ranks import fill
from gptcore.store import DamagedError, commit_dir, is_committed, read_json, verified, verify_file, write_json
from gptcore.vocab import Vocab
from gptcore.weights import WAY_OUT, check_weights, load_tensors

log = logging.getLogger(__name__)

FORMAT = 3  # 1: parameters without GPT-2's prefix `transformer.`; 2: random state of the first process only
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"


@dataclass
class Checkpoint:
    """What was read back. `state` holds step, tokens_seen, val metrics and the rest of the loop's memory."""

    directory: Path
    config: ExperimentConfig
    state: dict[str, Any]
    model: dict[str, Tensor]


@dataclass
class Snapshot:
    """All of a checkpoint, in tensors that nobody changes any more."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    config: ExperimentConfig
    tokenizer: Path


def save_checkpoint(folder: Path, snapshot: Snapshot) -> Path:
    """Commit `folder/step_NNNNNN`; returns its absolute path. Raises OSError (ENOSPC too) and leaves nothing of a failed one."""
    directory = checkpoint_path(folder, snapshot.step)
    if is_committed(directory):
        return directory
    manifest = {"kind": "checkpoint", "format": FORMAT, "step": snapshot.step, "vocab_size": snapshot.state["vocab_size"]}
    # Under a temporary name, flushed, then renamed: whoever is killed at any moment leaves the old checkpoint or the new one,
    # never half of one.
    with commit_dir(directory, manifest) as tmp:
        write_tensors(snapshot.model, tmp / MODEL)
        write_tensors(snapshot.optimizer, tmp / OPTIMIZER)
        write_json(tmp / "state.json", {**snapshot.state, "step": snapshot.step})
        # With config and vocabulary a checkpoint needs nothing else, whatever happens to the run's folder.
        write_yaml(snapshot.config, tmp / "config.yaml")
        shutil.copyfile(snapshot.tokenizer, tmp / "tokenizer.json")
    return directory


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, absolute."""
    return (folder / f"step_{step:06d}").resolve()


def prune_checkpoints(folder: Path, last: int, every: int = 0) -> None:
    """Delete all but the newest `last`, those at multiples of `every` steps (0: none), and the best that a kept one knows of."""
    found = {step_of(path): path for path in list_checkpoints(folder)}
    # More than one: the newest may be damaged, or the training may have gone astray before it was saved.
    kept = set(sorted(found)[-last:])
    for step in tuple(kept):
        try:
            kept.add(read_state(found[step])["best_step"] or step)
        except ValueError:  # a damaged one knows of no best one
            continue
        except OSError as error:
            log.warning("no checkpoint is deleted: which is the best one cannot be read (%s)", error)
            return
    for step, path in found.items():
        if step not in kept and not (every and step % every == 0):
            # Renamed first: a kill in the middle must not leave a checkpoint that looks whole.
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.old.tmp")))


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest first."""
    return [path for path in step_directories(folder) if is_committed(path)]


def step_directories(folder: Path) -> list[Path]:
    """All that is named as a checkpoint is, whole or not, oldest first; another name (`step_000500_good`) is the user's affair.

    Raises OSError for a folder that cannot be looked at: that it holds none is nothing to conclude from that.
    """
    try:
        names = os.listdir(folder)  # `glob` would see nothing
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((folder / name for name in names if re.fullmatch(r"step_\d{6,}", name)), key=step_of)


def step_of(directory: Path) -> int:
    return int(directory.name.removeprefix("step_"))


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every byte is what its manifest says, and what is wrong with each newer one.

    Raises OSError for one that cannot be read: it may be whole.
    """
    skipped = []
    # From the newest on: what is not whole costs the steps since the one before, not the run.
    for directory in reversed(step_directories(folder)):
        try:
            check_checkpoint(directory)
        except DamagedError as error:
            skipped.append(str(error).partition(";")[0])
        else:
            return directory, skipped
    return None, skipped


def check_checkpoint(directory: Path) -> None:
    """Raises UserError when it is not there or from another format, DamagedError when it is not whole, OSError when it cannot
    be read. Every byte is verified.
    """
    if not directory.is_dir():
        raise UserError(f"checkpoint {directory}: no such directory; give the path of a step_NNNNNN directory of a run")
    manifest = verified(directory)
    if manifest.get("kind") != "checkpoint" or manifest.get("format") != FORMAT:
        raise UserError(f"checkpoint {directory}: not a checkpoint of format {FORMAT}; it was written by another version")


def read_state(directory: Path) -> dict[str, Any]:
    """Step, tokens_seen, seconds, random state and the loop's memory. Raises DamagedError when it is not what was written."""
    verify_file(directory / "state.json")
    return read_json(directory / "state.json")


def load_checkpoint(directory: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read and verify a checkpoint's model and state. Raises what `check_checkpoint` raises."""
    check_checkpoint(directory)
    config, state = load_written(directory / "config.yaml"), read_state(directory)
    # A file that somebody sent is checked by its header first, before memory is taken for it.
    check_weights(directory / MODEL, config, state.get("vocab_size"), state.get("quantization"))
    return Checkpoint(directory, config, state, load_tensors(directory / MODEL, str(device)))


def load_model(directory: Path, device: torch.device | str = "cpu") -> tuple[LanguageModel, Checkpoint]:
    """The trained model of a checkpoint, in evaluation mode on `device`, and what came with it."""
    checkpoint = load_checkpoint(directory, device)
    # With another vocabulary every id means other text: the model would run, and answer nonsense.
    if Vocab.load(directory / "tokenizer.json").fingerprint != checkpoint.state.get("vocab_fingerprint"):
        raise UserError(f"{directory / 'tokenizer.json'}: not the vocabulary this model was trained with; {WAY_OUT}")
    model = build_model(checkpoint.config.model, checkpoint.state["vocab_size"])
    if "quantization" in checkpoint.state:
        with_layout(model, checkpoint.state["quantization"])
    model.to(device)
    model.load_weights(checkpoint.model)
    return model.eval(), checkpoint


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file one after the other, each a copy of its own on the CPU: never is the whole file in memory."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (no dict)
            # A copy: the tensor itself is a view of the mapped file, which may be deleted while it is used.
            yield name, file.get_tensor(name).clone()


def copy_tensors(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill `targets` from a file that holds exactly them; of one that is spread over processes, this one's rows."""
    missing = set(targets)
    for name, tensor in read_tensors(path):
        fill(targets[name], tensor)
        missing.discard(name)
    assert not missing, f"{path} lacks {sorted(missing)}"


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file. Raises OSError for a full disk, as everything else that writes does."""
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        # Its own type carries the number of the cause in words only: 'I/O error: … (os error 2) at path "…"'.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error), str(path)) from None

"""Room 7: checkpoints. A committed directory that holds all a run needs to go on, and all a model needs to be used.

    step_001000/{model.safetensors, optimizer.safetensors, state.json, config.yaml, tokenizer.json, manifest.json, COMMITTED}

safetensors for tensors, JSON for the rest, no pickle. Loading checks every hash.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptcore.config import ExperimentConfig, UserError, dump_yaml, load_config
from gptcore.models import LanguageModel, build_model
from gptcore.models.quantized import with_layout
from gptcore.store import commit_dir, is_committed, read_manifest, write_json

log = logging.getLogger(__name__)

FORMAT = 2  # 1: parameters without GPT-2's prefix `transformer.`


@dataclass
class Checkpoint:
    """What was read back. `state` holds step, tokens_seen, val metrics and the rest of the loop's memory."""

    directory: Path
    config: ExperimentConfig
    state: dict[str, Any]
    model: dict[str, Tensor]


def save_checkpoint(
    folder: Path,
    step: int,
    model: LanguageModel,
    optimizer_tensors: dict[str, Tensor],
    state: dict[str, Any],
    config: ExperimentConfig,
    tokenizer: Path,
    keep: int,
) -> Path:
    """Commit `folder/step_NNNNNN` and delete all but the newest `keep`; returns its absolute path."""
    directory = (folder / f"step_{step:06d}").resolve()
    if not is_committed(directory):
        manifest = {"kind": "checkpoint", "format": FORMAT, "step": step, "vocab_size": state["vocab_size"]}
        with commit_dir(directory, manifest) as tmp:
            save_file(_contiguous(model.weights()), tmp / "model.safetensors")
            save_file(_contiguous(optimizer_tensors), tmp / "optimizer.safetensors")
            write_json(tmp / "state.json", {**state, "step": step})
            (tmp / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
            shutil.copyfile(tokenizer, tmp / "tokenizer.json")
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return directory


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step_*") if is_committed(path))


def load_checkpoint(directory: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read and verify a checkpoint's model and state. Raises UserError when it is not there, not whole or from another format."""
    if not directory.is_dir():
        raise UserError(f"checkpoint {directory}: no such directory; give the path of a step_NNNNNN directory of a run")
    manifest = read_manifest(directory, verify=True)
    if manifest.get("kind") != "checkpoint" or manifest.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {directory}: not a checkpoint of format {FORMAT}; it was written by another version"
        )
    return Checkpoint(
        directory,
        load_config(directory / "config.yaml"),
        json.loads((directory / "state.json").read_text(encoding="utf-8")),
        load_file(directory / "model.safetensors", device=str(device)),
    )


def load_optimizer_tensors(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "optimizer.safetensors")


def load_model(directory: Path, device: torch.device | str = "cpu") -> tuple[LanguageModel, Checkpoint]:
    """The trained model of a checkpoint, in evaluation mode on `device`, and what came with it."""
    checkpoint = load_checkpoint(directory, device)
    model = build_model(checkpoint.config.model, checkpoint.state["vocab_size"])
    if "quantization" in checkpoint.state:
        with_layout(model, checkpoint.state["quantization"])
    model.to(device)
    model.load_weights(checkpoint.model)
    return model.eval(), checkpoint


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}

"""The other side of a comparison: a nanoGPT checkout given by `--peer-dir`, run unchanged in a copy. A module, not a script."""

from __future__ import annotations

import math
import os
import pickle  # the peer's own format: it reads its vocabulary from meta.pkl
import re
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cards import seeing

from gptcore.batches import val_batches

CHARACTERS = "config/train_shakespeare_char.py"
# README of nanoGPT, "I only have a macbook"
CPU_SETTING = (
    f"{CHARACTERS} --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 "
    "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)


@dataclass(frozen=True)
class PeerRun:
    """seconds: from process start to its end; losses: (iteration, the peer's own estimate of the validation loss, seconds so far)."""

    seconds: float
    losses: list[tuple[int, float, float]]
    step_ms: list[float]
    checkpoint: Path


class Peer:
    """A copy of the checkout with one data set in it: `folder/peer/data/<dataset>`."""

    def __init__(self, checkout: Path, folder: Path, dataset: str, train: np.ndarray, val: np.ndarray) -> None:
        self.directory = folder / "peer"
        shutil.copytree(checkout, self.directory, ignore=shutil.ignore_patterns(".git", "*.ipynb", "assets"))
        self.val = val.astype(np.uint16)
        self.data = self.directory / "data" / dataset
        self.data.mkdir(parents=True, exist_ok=True)
        train.astype(np.uint16).tofile(self.data / "train.bin")
        self.val.tofile(self.data / "val.bin")

    @classmethod
    def of_characters(cls, checkout: Path, text: Path, folder: Path) -> Peer:
        """One text, split as its own prepare.py does: the first 90 % of the characters train."""
        data = text.read_text(encoding="utf-8")
        chars = sorted(set(data))
        ids = {char: number for number, char in enumerate(chars)}
        encoded = np.array([ids[char] for char in data], dtype=np.uint16)
        cut = int(0.9 * len(data))
        peer = cls(checkout, folder, "shakespeare_char", encoded[:cut], encoded[cut:])
        with open(peer.data / "meta.pkl", "wb") as file:
            pickle.dump({"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": ids}, file)
        return peer

    def script_with_seed(self, seed: int) -> str:
        """Its train.py with another seed than the 1337 that is written there; nothing else differs."""
        source = (self.directory / "train.py").read_text(encoding="utf-8")
        assert source.count("torch.manual_seed(1337 + ") == 1
        name = f"train_{seed}.py"
        changed = source.replace("torch.manual_seed(1337 + ", f"torch.manual_seed({seed} + ")
        (self.directory / name).write_text(changed, encoding="utf-8")
        return name

    def train(self, out: str, *settings: str, script: str = "train.py", card: str | None = None) -> PeerRun:
        """`python train.py SETTINGS`, on one card of several; raises RuntimeError with its last lines when it fails."""
        command = [sys.executable, "-u", script, *settings, f"--out_dir={out}"]
        start = time.perf_counter()
        losses, step_ms, lines = [], [], []
        process = subprocess.Popen(
            command,
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | seeing(card),
        )
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if found := re.match(r"step (\d+): train loss [\d.]+, val loss ([\d.]+)", line):
                losses.append((int(found[1]), float(found[2]), time.perf_counter() - start))
            elif found := re.match(r"iter \d+: loss [\d.nan]+, time ([\d.]+)ms", line):
                step_ms.append(float(found[1]))
        if process.wait():
            raise RuntimeError(f"the peer failed:\n{''.join(lines[-20:])}")
        return PeerRun(time.perf_counter() - start, losses, step_ms, self.directory / out / "ckpt.pt")

    def load(self, checkpoint: Path, device: str = "cpu") -> Any:
        """The peer's model class with a checkpoint's weights."""
        loaded = torch.load(checkpoint, map_location=device, weights_only=True)
        module = runpy.run_path(str(self.directory / "model.py"))
        model = module["GPT"](module["GPTConfig"](**loaded["model_args"]))
        model.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in loaded["model"].items()})
        return model.eval().to(device)

    @torch.no_grad()
    def evaluate(self, model: Any, device: str = "cpu") -> float:
        """Our rule: every validation token once, in order, in windows of the model's own context; mean nats per token."""
        nats, count = 0.0, 0
        for batch in val_batches(self.val, model.config.block_size, 64):
            x, y = (torch.from_numpy(ids).to(device) for ids in batch)
            logits = model(x, y)[0].float().flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, y.flatten(), ignore_index=-1, reduction="sum")
            nats, count = nats + loss.item(), count + int((y >= 0).sum())
        assert count == len(self.val) - 1
        assert math.isfinite(nats)
        return nats / count

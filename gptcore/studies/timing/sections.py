"""Hooks that tell a clock which part of a model is at work, and what all parts of a map are called."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

from torch import nn

from gptcore.models import LanguageModel
from gptcore.timing import Path, PhaseClock

MODULES = {
    "attn": "attention",
    "mlp": "feed-forward",
    "lm_head": "head",
    "wte": "embedding",
    "wpe": "embedding",
    "rnn": "recurrence",
    "gru": "recurrence",
    "conv": "convolution",
    "ln_1": "norm",
    "ln_2": "norm",
    "ln_f": "norm",
}
LOSSES = {"cross_entropy": "loss", "head_cross_entropy": "head and loss"}  # the second makes logits and loss in one
COLLECTION = "garbage collection"
# What moves the model nearer to its text; everything else is time not training.
TRAINING = ("forward", "backward", "clip", "optimizer")


@contextmanager
def sections(model: LanguageModel, clock: PhaseClock) -> Iterator[None]:
    """Charge each module's forward pass, the loss and garbage collections to phases of their own, while the block lasts."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            section = MODULES.get(name.rsplit(".", 1)[-1])
            if section is not None:
                _hook(stack, module, section, clock)
        # The loss is called by its name in the file of a family, or of its head.
        kinds = {kind for module in model.modules() for kind in type(module).__mro__}
        files = {kind.__module__ for kind in kinds if kind.__module__.startswith("gptcore.")}
        for home, (name, section) in product([sys.modules[file] for file in files], LOSSES.items()):
            if hasattr(home, name):
                original = getattr(home, name)
                setattr(home, name, _timed(original, section, clock))
                stack.callback(setattr, home, name, original)
        collecting: list[Any] = []

        def on_collection(phase: str, _info: dict[str, int]) -> None:
            if phase == "start":
                collecting.append(clock.phase(COLLECTION))
                collecting[-1].__enter__()
            elif collecting:
                collecting.pop().__exit__(None, None, None)

        gc.callbacks.append(on_collection)
        stack.callback(gc.callbacks.remove, on_collection)
        yield


def _hook(stack: ExitStack, module: nn.Module, section: str, clock: PhaseClock) -> None:
    running: list[Any] = []

    def enter(_module: nn.Module, _args: object) -> None:
        running.append(clock.phase(section))
        running[-1].__enter__()

    def leave(_module: nn.Module, _args: object, _output: object) -> None:
        running.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave).remove)


def _timed(function: Callable[..., Any], section: str, clock: PhaseClock) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with clock.phase(section):
            return function(*args, **kwargs)

    return call


def label(path: Path) -> str:
    """`step / forward / attention`: a path as tables name it."""
    return " / ".join(path)


def trains(path: Path) -> bool:
    """Is this part of the map the training itself? Evaluation has a forward pass too, but teaches nothing."""
    return any(part in TRAINING for part in path) and "evaluate" not in path and "preflight and compile" not in path

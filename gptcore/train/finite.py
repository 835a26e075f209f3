"""Numbers that are no numbers: found on the device before the update, asked for once a report."""

from __future__ import annotations

import torch
from torch import Tensor

from gptcore.errors import NonFinite

SMALLEST_SCALE = 2.0**-10  # below it fp16 has lost the gradients themselves


class FiniteWatch:
    """Holds the first step whose loss or gradient was inf or nan, and keeps that update and all later ones from happening.

    Asking a GPU for a number waits for it, so there the device remembers, and `check` asks when the run stops for a report
    anyway. A CPU is asked at once (`at_once`).
    """

    def __init__(self, device: torch.device, *, at_once: bool) -> None:
        self.at_once = at_once
        self.checked = 0  # steps known to be good
        self._found = torch.zeros((), device=device)  # 1.0 from the first bad step on
        self._good_steps = torch.zeros((), device=device, dtype=torch.float64)  # since the last check
        self._values = torch.zeros(2, device=device)  # loss and norm of the last good or first bad step

    def note(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Look at one step, before its update; returns 0.0, or 1.0 where nothing may be updated any more."""
        values = torch.stack((loss.float(), norm.float()))
        self._values.copy_(torch.where(self._found > 0, self._values, values))
        self._found.copy_(torch.maximum(self._found, (~values.isfinite()).any().float()))
        self._good_steps += 1 - self._found
        return self._found

    def check(self, steps: int, lr: float) -> None:
        """Raises NonFinite if one of the first `steps` steps was bad."""
        if not self._found.item():
            self.checked = steps
            self._good_steps.zero_()
            return
        loss, norm = self._values.tolist()
        step = self.checked + int(self._good_steps.item())
        raise NonFinite(
            f"loss {loss} and gradient norm {norm} at step {step} with train.lr={lr}; "
            "lower train.lr, or raise train.warmup_steps"
        )


class LossScale:
    """fp16 gradients underflow, so the loss is multiplied before the backward pass and the gradients divided after it.

    Halved where a gradient overflows (that step is left out), doubled after 2,000 steps without (Micikevicius et al. 2018); all on
    the device, with the primitive under torch's GradScaler.
    """

    def __init__(self, device: torch.device, start: float = 2.0**16) -> None:
        self.scale = torch.full((), start, device=device)
        self.growth = torch.zeros((), device=device, dtype=torch.int32)  # steps since it last changed

    def unscale(self, gradients: list[Tensor]) -> None:
        torch._foreach_mul_(gradients, 1.0 / self.scale)

    def update(self, norm: Tensor) -> Tensor:
        """1.0 where this step's gradients overflowed; the scale of the next step follows from it."""
        overflow = (~norm.isfinite()).float()
        torch._amp_update_scale_(self.scale, self.growth, overflow, 2.0, 0.5, 2000)
        return overflow

    def check(self, step: int, lr: float) -> None:
        """Raises NonFinite when even a tiny scale overflows."""
        if self.scale.item() < SMALLEST_SCALE:
            raise NonFinite(
                f"fp16 gradients overflow at step {step} with train.lr={lr} even at loss scale {self.scale.item():.1e}; "
                "use train.precision=bf16, or lower train.lr"
            )

"""Learning-rate schedules: pure functions of the step, so a resumed run needs no state for them."""

from __future__ import annotations


def lr_factor(step: int, max_steps: int, warmup_steps: int, decay_fraction: float, min_factor: float) -> float:
    """Warmup–stable–decay (Hu et al. 2024): up linearly, flat, then down linearly to `min_factor` at the last step.

    The share of the peak learning rate that step `step` (0 to max_steps - 1) applies.
    """
    warmup = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    decay_steps = decay_fraction * max_steps
    left = (max_steps - step) / decay_steps if decay_steps else 1.0
    return min(warmup, min_factor + (1 - min_factor) * min(1.0, left))

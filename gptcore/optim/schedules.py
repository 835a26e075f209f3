"""Learning-rate schedules: pure functions of the step, so a resumed run needs no state for them."""

from __future__ import annotations

import math


def lr_factor(schedule: str, step: int, progress: float, warmup_steps: int, decay_fraction: float, min_factor: float) -> float:
    """The share of the peak learning rate that step `step` (from 0 on) applies.

    progress: share of the run that is over before this step, 0 to 1: `step / max_steps`, or the clock's.
    wsd: flat, then linear over the last `decay_fraction` (Hu et al. 2024); cosine (Loshchilov & Hutter 2017); linear. All
    fall to `min_factor`, after a linear warmup.
    """
    # At first AdamW's second moments and the momentum are of one or two batches, and steps as large as later ones go astray
    # (Goyal et al. 2017; Ma & Yarats 2021). Step 0 moves a little already: + 1.
    warmup = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    left = 1.0 - progress
    if schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule == "linear":
        share = left
    # wsd (warmup, stable, decay). While the rate is high the loss hovers above what the weights have learnt; the fall settles
    # them. What a cosine fixes at the start, the end, is open here: any checkpoint of the flat part can go on, or be cooled
    # down.
    else:
        share = min(1.0, left / decay_fraction) if decay_fraction else 1.0
    # The smaller of the two, so a warmup longer than the flat part makes no jump.
    return min(warmup, min_factor + (1 - min_factor) * share)

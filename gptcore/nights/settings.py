"""What can be chosen about a night; the same class is the form in the Prefect UI."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Outcome = Literal["promoted", "kept", "skipped", "refused", "failed"]


class NightlySettings(BaseModel):
    """When tonight's model replaces the champion, what is kept, and who is told."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    min_effect: float = Field(
        0.002,
        ge=0,
        lt=1,
        title="Minimum effect (bits per byte)",
        description="So much fewer bits per byte on the frozen hold-outs, at least, or the champion stays.",
    )
    guard_percent: float = Field(
        1.0,
        ge=0,
        le=100,
        title="Guard per source (%)",
        description="A source, or an earlier night's hold-out, may become worse by at most so many per cent.",
    )
    memorised_percent: float = Field(
        5.0,
        ge=0,
        le=100,
        title="Memorisation guard (%)",
        description="The share of training text the model recites may exceed that of held-out text by at most so much; "
        "nor may more than this of the hold-outs stand in tonight's training text.",
    )
    corrupt_percent: float = Field(
        10.0,
        ge=0,
        le=100,
        title="Unreadable text (%)",
        description="Refuse the night when in more than this share of the new text the order of the characters means nothing "
        "to the champion: damaged text, or another language.",
    )
    shrink_percent: float = Field(
        50.0,
        ge=0,
        le=100,
        title="Shrunken sources (%)",
        description="Refuse the night when the sources hold less than this share of what they held last time.",
    )
    warm_lr: float = Field(
        0.5,
        gt=0,
        le=1,
        title="Learning rate of the warm arm (share)",
        description="The warm start is warmed up again, to this share of the experiment's peak learning rate.",
    )
    new_vocabulary: bool = Field(
        False,
        title="An arm with a new vocabulary",
        description="Also train from scratch with a vocabulary learnt from all text so far. A third arm, a third more time.",
    )
    resamples: int = Field(
        2000, ge=100, le=100_000, title="Bootstrap resamples", description="For the interval of the difference."
    )
    keep_nights: int = Field(
        14,
        ge=1,
        le=3650,
        title="Nights kept",
        description="Checkpoints, shards and MLflow runs of older nights go, unless an alias or a rollback needs them.",
    )
    disk_budget_gib: float = Field(
        50.0, gt=0, title="Disk budget (GiB)", description="Above it a night does not start, and says so."
    )
    notify: list[str] = Field(
        default_factory=list,
        title="Notify",
        description="Apprise URLs (mailto://…, slack://…, json://…) or Prefect notification blocks as TYPE/NAME.",
    )
    notify_on: list[Outcome] = Field(
        ["promoted", "refused", "failed", "skipped"], title="Notify on", description="Outcomes that are worth a message."
    )

"""What can be chosen about a night; the same class is the form in the Prefect UI."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Outcome = Literal["promoted", "kept", "skipped", "refused", "failed"]
# An environment variable, or a Prefect block: a name where an address, with the secret in it, would be kept in clear.
RECEIVER = r"^(?:[A-Z][A-Z0-9_]*|[a-z0-9-]+/[a-z0-9-]+)$"
Percent = Annotated[float, Field(ge=0, le=100)]


def _setting(default: Any, title: str, description: str, **bounds: Any) -> Any:
    return Field(default, title=title, description=description, **bounds)


class NightlySettings(BaseModel):
    """When tonight's model replaces the champion, what is kept, and who is told."""

    # What is refused may hold a secret: the error does not repeat it.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    min_effect: float = _setting(
        0.002,
        "Minimum effect (bits per byte)",
        "So much fewer bits per byte on the frozen hold-outs, at least, or the champion stays.",
        ge=0,
        lt=1,
    )
    guard_percent: Percent = _setting(
        1.0, "Guard per source (%)", "A source, or an earlier night's hold-out, may become worse by at most so many per cent."
    )
    memorised_percent: Percent = _setting(
        5.0,
        "Memorisation guard (%)",
        "The share of training text the model recites may exceed that of held-out text by at most so much; "
        "nor may more than this of the hold-outs stand in tonight's training text.",
    )
    corrupt_percent: Percent = _setting(
        10.0,
        "Unreadable text (%)",
        "Refuse the night when in more than this share of the new text the order of the characters means nothing "
        "to the champion: damaged text, or another language.",
    )
    shrink_percent: Percent = _setting(
        50.0, "Shrunken sources (%)", "Refuse the night when the sources hold less than this share of what they held last time."
    )
    warm_lr: float = _setting(
        0.5,
        "Learning rate of the warm arm (share)",
        "The warm start is warmed up again, to this share of the experiment's peak learning rate.",
        gt=0,
        le=1,
    )
    new_vocabulary: bool = _setting(
        False,
        "An arm with a new vocabulary",
        "Also train from scratch with a vocabulary learnt from all text so far. A third arm, a third more time.",
    )
    resamples: int = _setting(2000, "Bootstrap resamples", "For the interval of the difference.", ge=100, le=100_000)
    keep_nights: int = _setting(
        14,
        "Nights kept",
        "Checkpoints, shards and MLflow runs of older nights go, unless an alias or a rollback needs them.",
        ge=1,
        le=3650,
    )
    disk_budget_gib: float = _setting(50.0, "Disk budget (GiB)", "Above it a night does not start, and says so.", gt=0)
    notify: list[str] = Field(
        default_factory=list,
        title="Notify",
        description="Names of environment variables that hold Apprise URLs (mailto://…, slack://…, json://…), or Prefect notification "
        "blocks as TYPE/NAME.",
        json_schema_extra={"items": {"type": "string", "pattern": RECEIVER}},
    )
    notify_on: list[Outcome] = _setting(
        ["promoted", "refused", "failed", "skipped"], "Notify on", "Outcomes that are worth a message."
    )

    @field_validator("notify")
    @classmethod
    def _only_names(cls, receivers: list[str]) -> list[str]:
        if not all(re.fullmatch(RECEIVER, receiver) for receiver in receivers):
            raise ValueError(
                "an address of a receiver holds a secret, and settings are kept and shown in clear; put it into an environment variable of "
                "the worker (NIGHT_RECEIVERS='slack://…' gptloom up) and give that variable's name, or a Prefect block as TYPE/NAME"
            )
        return receivers

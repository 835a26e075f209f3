"""What every section of the experiment file shares."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every section: unknown keys are refused, and inf and nan; values are frozen once checked.

    A description that does not fit into its field's line stands below it, and is one line to whoever shows it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True, defer_build=True
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for field in cls.model_fields.values():
            field.description = " ".join((field.description or "").split()) or None
        # Only now: the schema holds the descriptions, too.
        cls.model_rebuild()

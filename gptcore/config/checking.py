"""A tree of plain values against the classes; every mistake in it told as one sentence with its way out."""

from __future__ import annotations

import reprlib
from typing import Any

from pydantic import ValidationError

from gptcore.config.data import SourceConfig, hide_password
from gptcore.config.experiment import ExperimentConfig
from gptcore.errors import UserError

MAX_TOLD = 10  # mistakes in one message
FIELDS = {*ExperimentConfig.model_fields, *SourceConfig.model_fields}.union(
    *(getattr(field.annotation, "model_fields", ()) for field in ExperimentConfig.model_fields.values())
)


def check_config(tree: dict[str, Any], origin: str = "config") -> ExperimentConfig:
    """Validate a nested dict; every mistake in it, up to ten, becomes part of one UserError."""
    try:
        return ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        errors = error.errors()
        # A list of sources fails twice, as a list and as a string; only the first says something.
        told = [e for e in errors if not (e["loc"][-1:] == ("str",) and isinstance(e["input"], tuple))] or errors
        raise UserError(f"{origin}: " + "; ".join(_describe(e) for e in told[:MAX_TOLD])) from None


def _describe(error: Any) -> str:
    unknown = error["loc"][-1] if error["type"] == "extra_forbidden" else None
    # For a field of several types pydantic puts theirs between the names: `int`, `tuple[SourceConfig, ...]`.
    loc = [part for part in error["loc"] if isinstance(part, int) or part in FIELDS or part == unknown]
    where = ".".join(map(str, loc))
    if error["type"] == "extra_forbidden":
        return f"unknown key {where!r}; {_known_keys(loc)}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{where}={hide_password(_short(error['input']))}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _short(value: Any) -> str:
    """Its repr, cut: a few lines of YAML, each an alias of the one before, can name a value of gigabytes."""
    cutter = reprlib.Repr()
    cutter.maxlevel, cutter.maxstring, cutter.maxother = 3, 200, 100
    return cutter.repr(value)[:200]


def _known_keys(loc: list[Any]) -> str:
    import difflib

    section = getattr(ExperimentConfig.model_fields.get(str(loc[0])), "annotation", None) if len(loc) > 1 else ExperimentConfig
    found = SourceConfig if loc[:2] == ["data", "source"] else section
    known = list(getattr(found, "model_fields", ExperimentConfig.model_fields))
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"

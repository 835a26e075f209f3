"""Fields of a tree changed: by a file, by `section.field=value` on the command line, by code; one rule for all.

A new end of the run replaces those before it: whoever says when to stop means it. A new `model.preset` also resets what the preset
before it had filled in.
"""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from gptcore.config.checking import check_config
from gptcore.config.data import hide_password
from gptcore.config.experiment import ExperimentConfig
from gptcore.config.model import PRESET_FIELDS
from gptcore.config.reading import read_value, read_yaml
from gptcore.config.train import ENDS, MAY_CHANGE
from gptcore.errors import UserError

Changes = dict[str, dict[str, Any]]  # section → field → value


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> ExperimentConfig:
    """Read an experiment file, then apply `section.field=value` overrides in order.

    Raises UserError for a missing or unreadable file, an unknown key, a wrong type or an impossible combination.
    """
    path = Path(path)
    return _resolve(read_yaml(path, "experiment file"), path, overrides)


def load_written(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> ExperimentConfig:
    """The settings that a run or a checkpoint has written down. An empty file is damaged here; as an experiment file it would mean all
    defaults. Raises UserError."""
    tree = read_yaml(path, "settings")
    if not tree:
        raise UserError(f"settings {path}: damaged, the file is empty; put a copy of it back, or begin anew")
    return _resolve(tree, path, overrides)


def _resolve(tree: dict[str, Any], path: Path, overrides: list[str] | tuple[str, ...]) -> ExperimentConfig:
    tree.setdefault("name", path.stem)
    names, changes = _read_overrides(overrides)
    for section in changes:
        if not isinstance(tree.get(section) or {}, dict):
            override = next(override for override in overrides if override.startswith(f"{section}."))
            raise UserError(
                f"override {hide_password(override)!r}: section {section!r} of the experiment file is not a mapping"
            )
    return check_config(lay_over(tree | names, changes), str(path))


def with_changes(config: ExperimentConfig, origin: str = "config", /, **sections: dict[str, Any]) -> ExperimentConfig:
    """A checked copy with some fields changed: `with_changes(config, train={"max_steps": 10})`.

    Raises UserError that begins with `origin`.
    """
    known = [name for name, value in config if isinstance(value, BaseModel)]
    for section, fields in sections.items():
        if section not in known or not isinstance(fields, dict):
            raise UserError(f"{origin}: unknown section {section!r}; known sections: {', '.join(known)}")
    return check_config(lay_over(_dump_for(config, sections), sections), origin)


def with_overrides(config: ExperimentConfig, overrides: list[str] | tuple[str, ...], origin: str) -> ExperimentConfig:
    """A checked copy with `section.field=value` changes, as the command line has them. Raises UserError."""
    names, changes = _read_overrides(overrides)
    return check_config(lay_over(_dump_for(config, changes) | names, changes), origin)


def lay_over(tree: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """The tree with changes laid over it, field by field; an end that is given replaces the others."""
    tree = dict(tree)
    for section, fields in changes.items():
        kept = tree.get(section) or {}
        if section == "train" and any(fields.get(end) is not None for end in ENDS):
            kept = {key: value for key, value in kept.items() if key not in ENDS}
        tree[section] = {**kept, **fields}
    return tree


def differences(before: ExperimentConfig, now: ExperimentConfig) -> list[str]:
    """What keeps a training from going on with other settings, field by field; empty when it may."""
    old, new = (config.model_dump(mode="json", exclude={"name": True, "train": MAY_CHANGE}) for config in (before, now))
    return [
        f"{section}.{field}: {old[section][field]!r} there, {new[section][field]!r} now"
        for section in old
        for field in old[section]
        if old[section][field] != new[section][field]
    ]


def _dump_for(config: ExperimentConfig, changes: Changes) -> dict[str, Any]:
    """The tree to change: a new preset fills what the one before it had filled."""
    tree = config.model_dump(mode="json")
    if "preset" in changes.get("model", {}):
        tree["model"] = {key: value for key, value in tree["model"].items() if key not in PRESET_FIELDS}
    return tree


def _read_overrides(overrides: list[str] | tuple[str, ...]) -> tuple[dict[str, str], Changes]:
    """(the name, where it is given; the changes)."""
    names: dict[str, str] = {}
    changes: Changes = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        parts = key.split(".")
        if separator and key == "name":
            names["name"] = text
        elif not separator or len(parts) != 2 or not all(parts):
            raise UserError(f"override {hide_password(override)!r}: expected section.field=value, e.g. train.lr=0.01")
        else:
            changes.setdefault(parts[0], {})[parts[1]] = _read_override(parts[0], parts[1], text)
    return names, changes


def _read_override(section: str, field: str, text: str) -> Any:
    value, types = read_value(text), _types(section, field)
    # A source or a prompt is text even where YAML would read a number or a date in it; a list of sources is none.
    if str in types:
        return value if isinstance(value, list) and types - {str, type(None)} else text
    if not text:
        raise UserError(f"override '{section}.{field}=': empty; give a value, or {section}.{field}=null for none")
    return value if isinstance(value, (int, float, bool, type(None), list)) else text


def _types(section: str, field: str) -> set[Any]:
    """The types that a field may have; none for a field that is not there."""
    model = ExperimentConfig.model_fields.get(section)
    known = getattr(model and model.annotation, "model_fields", {}).get(field)
    if known is None:
        return set()
    return set(get_args(known.annotation)) if get_origin(known.annotation) in (Union, UnionType) else {known.annotation}

"""The tree as YAML and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from gptcore.config.data import hide_password
from gptcore.errors import UserError, why_unreadable


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2's idea of scalars: `on` and `off` are words, `1e-3` is a number. A key that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"{min(twice)!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


BOOL, FLOAT, TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "timestamp"))
_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in (BOOL, FLOAT, TIMESTAMP)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver(BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_YamlLoader.add_implicit_resolver(
    FLOAT,
    re.compile(r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|nan))$"),
    list("-+0123456789."),
)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """A YAML file with sections as a dict; `what` names its kind in messages. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{what} {path}: cannot be read ({why_unreadable(error)}); give the path of a YAML file, e.g. experiments/smoke.yaml"
        ) from None
    try:
        tree = yaml.load(text, Loader=_YamlLoader) or {}
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{what} {path}: not valid YAML ({hide_password(' '.join(str(error).split()))[:300]})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{what} {path}: expected sections like 'data:' and 'train:', found {type(tree).__name__}")
    return tree


def read_value(text: str) -> Any:
    """A value of the command line, as YAML reads it; text that is no YAML stays text."""
    try:
        return yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError:
        return text


def flatten(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """`{"train.lr": 0.02, …}`: the tree as MLflow parameters."""
    flat: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json").items():
        inner = {f".{k}": v for k, v in value.items()} if isinstance(value, dict) else {"": value}
        flat |= {f"{prefix}{key}{k}": v for k, v in inner.items()}
    return flat


def dump_yaml(config: BaseModel) -> str:
    """The resolved tree as YAML that load_config reads back to an equal tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

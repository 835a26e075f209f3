"""The tree as YAML and back.

A file that we write ourselves begins with the sha256 of the rest, as a comment; one that a user wrote does not, and is not checked.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from gptcore.config.data import hide_password
from gptcore.errors import UserError, why_unreadable

# More than any experiment needs, and read in a second or two: a few lines of aliases of aliases can name gigabytes.
MAX_BYTES, MAX_VALUES, MAX_DEPTH, MAX_DIGITS = 1 << 18, 20_000, 50, 40
WRITTEN = 16  # times as much in a file of ours: it states every default of what it was made from


class _TooMuchError(yaml.YAMLError):
    """A text whose values would fill time and memory."""


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2's idea of scalars: `on` and `off` are words, `1e-3` is a number. A key that is there twice is an error."""

    levels = values = 0
    times = 1

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.levels, self.values = self.levels + 1, self.values + 1
        _check_measure(self.values, self.levels, self.times)
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, times in keys.items() if times > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{min(twice)!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, f"a number of {len(node.value)} digits", node.start_mark)
        return int(super().construct_yaml_int(node))


BOOL, FLOAT, TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "timestamp"))
_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in (BOOL, FLOAT, TIMESTAMP)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_constructor("tag:yaml.org,2002:int", _YamlLoader.construct_yaml_int)
_YamlLoader.add_implicit_resolver(BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_YamlLoader.add_implicit_resolver(
    FLOAT,
    re.compile(r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|nan))$"),
    list("-+0123456789."),
)


SEAL = "# sha256 "  # and 64 hex digits, of what follows the first line


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """A YAML file with sections as a dict; `what` names its kind in messages. Raises UserError, also for a file of ours that is not as
    it was written."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(WRITTEN * MAX_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{what} {path}: cannot be read ({why_unreadable(error)}); give the path of a YAML file, e.g. experiments/smoke.yaml"
        ) from None
    is_ours = text.startswith(SEAL)
    # What is too long was cut above, and has no seal any more.
    if is_ours and len(text) <= WRITTEN * MAX_BYTES:
        seal, _, rest = text.partition("\n")
        if seal != _seal(rest):
            raise UserError(
                f"{what} {path}: damaged, it differs from the checksum in its first line; if you changed it yourself, delete that line"
            )
    try:
        tree = _load(text, WRITTEN if is_ours else 1) or {}
    except _TooMuchError as error:
        raise UserError(f"{what} {path}: {error}; nothing that is needed here is so much") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(f"{what} {path}: not valid YAML ({hide_password(' '.join(str(error).split()))[:300]})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{what} {path}: expected sections like 'data:' and 'train:', found {type(tree).__name__}")
    return tree


def read_value(text: str) -> Any:
    """A value of the command line, as YAML reads it; text that is no YAML stays text. Raises UserError for one that is too much."""
    try:
        return _load(text)
    except _TooMuchError as error:
        raise UserError(f"value {hide_password(text[:80])}…: {error}; give a shorter one") from None
    except (yaml.YAMLError, ValueError, TypeError):
        return text


def _load(text: str, times: int = 1) -> Any:
    """Raises YAMLError, ValueError or TypeError for what is no YAML, or too much of it: more than so many times the limits."""
    if len(text) > times * MAX_BYTES:
        raise _TooMuchError(f"more than {times * MAX_BYTES:,} characters")
    loader = _YamlLoader(text)
    loader.times = times
    try:
        node = loader.get_single_node()
        if node is not None:
            _measure(node, {}, times)
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None], times: int) -> tuple[int, int]:
    """(values, levels) below a node, an alias counted as often as it stands there. Raises _TooMuchError."""
    if id(node) in known:
        if (found := known[id(node)]) is None:
            raise _TooMuchError("a value that contains itself")
        return found
    known[id(node)] = None
    parts = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    sizes = [_measure(part, known, times) for part in parts]
    values, levels = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
    _check_measure(values, levels, times)
    known[id(node)] = values, levels
    return values, levels


def _check_measure(values: int, levels: int, times: int) -> None:
    if values > times * MAX_VALUES or levels > MAX_DEPTH:
        raise _TooMuchError(f"more than {times * MAX_VALUES:,} values or {MAX_DEPTH} levels, aliases counted")


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


def write_yaml(config: BaseModel, path: Path) -> None:
    """The resolved tree as a sealed file, flushed and renamed: whoever is killed leaves the old file or the new one, whole."""
    text = dump_yaml(config)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(tmp, "w", encoding="utf-8") as file:
        file.write(f"{_seal(text)}\n{text}")
        file.flush()
        os.fsync(file.fileno())
    tmp.replace(path)


def _seal(text: str) -> str:
    return SEAL + hashlib.sha256(text.encode()).hexdigest()

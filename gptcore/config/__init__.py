"""The experiment file as a typed tree: one class per section, one field per choice.

The same classes check a YAML file, `section.field=value` on the command line and the form in the Prefect UI, so
a wrong key or value is refused in one place with one sentence. No torch here: checking a file costs milliseconds.

    python -m gptcore.config experiments/shakespeare.yaml train.lr=0.01      # prints the resolved tree
"""

from __future__ import annotations

import re
import reprlib
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from gptcore.config.base import Section, UserError
from gptcore.config.data import DataConfig, SourceConfig, VocabConfig, hide_password, refuse_secret
from gptcore.config.model import PRESET_FIELDS, ModelConfig
from gptcore.config.switches import StudiesConfig
from gptcore.config.train import ENDS, MAY_CHANGE, TrainConfig

__all__ = [
    "DataConfig",
    "EvaluateConfig",
    "ExperimentConfig",
    "ModelConfig",
    "Section",
    "SourceConfig",
    "StudiesConfig",
    "TrainConfig",
    "UserError",
    "VocabConfig",
    "changed",
    "check_config",
    "differences",
    "dump_yaml",
    "flatten",
    "hide_password",
    "load_config",
    "read_yaml",
    "refuse_secret",
    "with_changes",
    "with_overrides",
]


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2's idea of scalars: `on` and `off` are words, `1e-3` is a number. A key that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"{min(twice)!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_YamlLoader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp)
        for tag, regexp in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|nan))$"),
    list("-+0123456789."),
)


MAX_TOLD = 10  # mistakes in one message

# How pydantic names the choices of a field with several types; no part of the field's name.
UNION_ARMS = ("int", "str", "literal['auto']", "tuple[SourceConfig, ...]")


class EvaluateConfig(Section):
    """The fixed yardstick: the whole validation split, each token once, in order."""

    batch_size: int = Field(
        64,
        ge=1,
        description="Sequences per forward pass; does not change the result on the whole split, but train.eval_tokens is rounded "
        "up to whole batches.",
    )
    bootstrap: int = Field(1000, ge=0, description="Resamples for the 95 % interval of bits per byte; 0: no interval.")
    samples: int = Field(3, ge=0, le=100, description="Texts to sample from the trained model.")
    sample_tokens: int = Field(400, ge=1, description="Length of a sample, in tokens.")
    prompt: str = Field("", description="Start of every sample; empty: the start of a document.")
    temperature: float = Field(0.8, ge=0, le=10, description="Sampling temperature; 0 picks the likeliest token.")
    top_k: int | None = Field(None, ge=1, description="Sample among the k likeliest tokens only.")
    seed: int = Field(42, ge=0, description="Seed of the samples and of the interval.")


class ExperimentConfig(Section):
    """One experiment, from raw text to report."""

    name: str = Field(
        "experiment",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
        description="Experiment name in MLflow; the YAML file's name by default.",
    )
    data: DataConfig = Field(default_factory=DataConfig)
    vocab: VocabConfig = Field(default_factory=VocabConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    studies: StudiesConfig = Field(default_factory=StudiesConfig)

    @model_validator(mode="after")
    def _accumulation_divides(self) -> ExperimentConfig:
        if "accumulation" in self.studies.short and self.train.global_batch_size % self.studies.accumulation_steps:
            raise ValueError(
                f"studies.accumulation_steps={self.studies.accumulation_steps} does not divide "
                f"train.global_batch_size={self.train.global_batch_size}; change one, or set studies.accumulation=false"
            )
        return self


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> ExperimentConfig:
    """Read an experiment file, then apply `section.field=value` overrides in order.

    Raises UserError for a missing or unreadable file, an unknown key, a wrong type or an impossible combination.
    """
    path = Path(path)
    tree = read_yaml(path, "experiment file")
    tree.setdefault("name", path.stem)
    return _overridden(tree, overrides, str(path))


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """A YAML file with sections as a dict; `what` names its kind in messages. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{what} {path}: cannot be read ({_reason(error)}); give the path of a YAML file, e.g. experiments/smoke.yaml"
        ) from None
    try:
        tree = yaml.load(text, Loader=_YamlLoader) or {}
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{what} {path}: not valid YAML ({hide_password(' '.join(str(error).split()))[:300]})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{what} {path}: expected sections like 'data:' and 'train:', found {type(tree).__name__}")
    return tree


def check_config(tree: dict[str, Any], origin: str = "config") -> ExperimentConfig:
    """Validate a nested dict; every mistake in it, up to ten, becomes part of one UserError."""
    try:
        return ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        errors = error.errors()
        # A list of sources fails twice, as a list and as a string; only the first says something.
        told = [e for e in errors if not (e["loc"][-1:] == ("str",) and isinstance(e["input"], tuple))] or errors
        raise UserError(f"{origin}: " + "; ".join(_describe(e) for e in told[:MAX_TOLD])) from None


def flatten(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """`{"train.lr": 0.02, …}`: the tree as MLflow parameters."""
    flat: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json").items():
        flat.update(
            {f"{prefix}{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return flat


def dump_yaml(config: BaseModel) -> str:
    """The resolved tree as YAML that load_config reads back to an equal tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def with_changes(config: ExperimentConfig, **sections: dict[str, Any]) -> ExperimentConfig:
    """A checked copy with some fields changed: `with_changes(config, train={"max_steps": 10})`.

    A change of `model.preset` also resets what the preset before it had filled in.
    """
    tree = config.model_dump(mode="json")
    if "preset" in sections.get("model", {}):
        tree["model"] = {key: value for key, value in tree["model"].items() if key not in PRESET_FIELDS}
    for section, fields in sections.items():
        tree[section].update(fields)
    return check_config(tree)


def differences(before: ExperimentConfig, now: ExperimentConfig) -> list[str]:
    """What keeps a training from going on with other settings, field by field; empty when it may."""
    old, new = (config.model_dump(mode="json", exclude={"name": True, "train": MAY_CHANGE}) for config in (before, now))
    return [
        f"{section}.{field}: {old[section][field]!r} there, {new[section][field]!r} now"
        for section in old
        for field in old[section]
        if old[section][field] != new[section][field]
    ]


def with_overrides(config: ExperimentConfig, overrides: list[str] | tuple[str, ...], origin: str) -> ExperimentConfig:
    """A checked copy with `section.field=value` changes, as the command line has them. Raises UserError."""
    return _overridden(config.model_dump(mode="json"), overrides, origin) if overrides else config


def changed(config: ExperimentConfig, sections: dict[str, dict[str, Any]], origin: str) -> ExperimentConfig:
    """`with_changes` for what a file says: an unknown section is the user's mistake, a new end of the run replaces the old ones.

    Raises UserError that begins with `origin`.
    """
    tree = config.model_dump(mode="json")
    for section, fields in sections.items():
        if not isinstance(tree.get(section), dict) or not isinstance(fields, dict):
            known = [key for key, value in tree.items() if isinstance(value, dict)]
            raise UserError(f"{origin}: unknown section {section!r}; known sections: {', '.join(known)}")
        if section == "model" and "preset" in fields:
            tree["model"] = {key: value for key, value in tree["model"].items() if key not in PRESET_FIELDS}
        if section == "train" and fields.keys() & set(ENDS):
            tree["train"] = {key: value for key, value in tree["train"].items() if key not in ENDS}
        tree[section].update(fields)
    return check_config(tree, origin)


def _overridden(tree: dict[str, Any], overrides: list[str] | tuple[str, ...], origin: str) -> ExperimentConfig:
    if any(override.startswith(tuple(f"train.{end}=" for end in ENDS)) for override in overrides):
        # Whoever says when to stop means it: an end on the command line replaces those of the file.
        tree["train"] = {key: value for key, value in (tree.get("train") or {}).items() if key not in ENDS}
    for override in overrides:
        _apply_override(tree, override)
    return check_config(tree, origin=origin)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or len(parts) != 2 or not all(parts):
        if separator and key == "name":
            tree["name"] = text
            return
        raise UserError(f"override {hide_password(override)!r}: expected section.field=value, e.g. train.lr=0.01")
    section, field = parts
    try:
        value = yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError:
        value = text
    # A source or a prompt is text even where YAML would read a number or a date in it.
    is_text = (section, field) in {
        ("data", "source"),
        ("data", "text_column"),
        ("data", "dask_address"),
        ("vocab", "source"),
        ("train", "init_from"),
        ("evaluate", "prompt"),
    }
    is_list_of_sources = (section, field) == ("data", "source") and isinstance(value, list)
    if not text and not is_text:
        raise UserError(f"override {override!r}: empty; give a value, or {key}=null for none")
    if not is_list_of_sources and (is_text or not isinstance(value, (int, float, bool, type(None), list))):
        value = text
    branch = tree.setdefault(section, {})
    if not isinstance(branch, dict):
        raise UserError(f"override {hide_password(override)!r}: section {section!r} of the experiment file is not a mapping")
    branch[field] = value


def _describe(error: Any) -> str:
    loc = [part for part in error["loc"] if part not in UNION_ARMS]
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

    section = ExperimentConfig.model_fields.get(str(loc[0]))
    nested = section.annotation if len(loc) > 1 and section is not None else None
    if loc[:2] == ["data", "source"]:
        nested = SourceConfig
    known = (
        list(nested.model_fields)
        if isinstance(nested, type) and issubclass(nested, BaseModel)
        else list(ExperimentConfig.model_fields)
    )
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "not UTF-8 text"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        sys.stdout.write(dump_yaml(load_config(argv[0], argv[1:])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

"""A study file: the question, a base experiment, and what is varied. `gptloom study NAME` reads experiments/studies/NAME.yaml.

    study: accumulation
    question: Does a batch split into micro-steps give the same gradient?
    base: ../smoke.yaml                 # an experiment file, seen from the study file
    changes: {train: {max_steps: 300}}  # to the base, for all cells
    grid: {train.precision: [fp32, bf16], options.repeats: [5]}
    arms:
      - {name: large, changes: {train: {global_batch_size: 64}}, options: {micro_steps: 8}}
      - {name: small, changes: {train: {global_batch_size: 8}}}
    seeds: [1, 2, 3]
    options: {repeats: 5}               # the study's own settings, for all cells
    smoke: {seeds: [1], changes: {train: {max_steps: 5}}}   # laid over all this by --smoke

A cell is one arm at one point of the grid with one seed. No torch here: checking a file costs milliseconds.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from gptcore.config import (
    ExperimentConfig,
    Section,
    UserError,
    load_config,
    read_yaml,
    with_changes,
    with_overrides,
    write_yaml,
)
from gptcore.config.changing import Changes, lay_over
from gptcore.config.reading import read_value
from gptcore.config.switches import SHORT, STUDIES

FOLDER = Path("experiments/studies")  # next to the working folder, else what comes with gptloom
SHIPPED = Path(__file__).parents[2] / "gptloom" / FOLDER
NO_END = 1e6  # minutes: a short form is over when it is over


class ArmConfig(Section):
    """One of the things that are compared."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+ -]{0,39}$", description="What tables call it.")
    changes: Changes = Field(default_factory=dict, description="Fields of the experiment that are different here.")
    options: dict[str, Any] = Field(default_factory=dict, description="Settings of the study that are different here.")


class StudyConfig(Section):
    """A question, and the cells that answer it."""

    study: str = Field(description="Which measurement: a package of gptcore.studies.")
    question: str = Field(min_length=10, description="What the study answers, in one sentence.")
    base: str = Field(description="Experiment file, seen from the study file.")
    changes: Changes = Field(default_factory=dict, description="Changes to the base, for all cells.")
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """section.field (or options.field) → values; all combinations are measured."""
    arms: list[ArmConfig] = Field(default_factory=lambda: [ArmConfig(name="base")], min_length=1)
    """The things that are compared."""
    baseline: str = Field("", description="The arm that the others are compared with; empty: the first.")
    seeds: tuple[int, ...] = Field((1, 2, 3), min_length=1, description="One cell each; results are paired by seed.")
    minutes: float = Field(30, gt=0)
    """No cell is begun later, and trainings stop at a checkpoint; the same command goes on."""
    options: dict[str, Any] = Field(default_factory=dict, description="Settings of the study, for all cells.")

    @field_validator("study")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in STUDIES:
            raise ValueError(f"study={value!r}: not known; give one of {', '.join(STUDIES)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"arms: two have the same name ({', '.join(names)})")
        if self.baseline and self.baseline not in names:
            raise ValueError(f"baseline={self.baseline!r}: no such arm; arms: {', '.join(names)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: a seed twice is the same measurement twice")
        for key, values in self.grid.items():
            if key.count(".") != 1 or not values:
                raise ValueError(f"grid: {key!r} needs the form section.field: [value, …]")
        return self


@dataclass(frozen=True)
class Cell:
    """One arm at one point of the grid with one seed: what is measured. Results are kept under `key_parts`."""

    name: str  # unique in the study, fit for a folder
    arm: str
    factors: dict[str, Any]  # the grid's values here, by section.field
    seed: int
    config: ExperimentConfig  # resolved; train.seed is the seed
    options: Any = field(default_factory=dict)  # a dict from the file; the study's own class once checked


@dataclass(frozen=True)
class StudyPlan:
    """A study file, resolved: everything that will be measured, known before anything starts."""

    config: StudyConfig
    base: ExperimentConfig
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        return self.config.study

    @property
    def baseline(self) -> str:
        return self.config.baseline or self.config.arms[0].name

    @property
    def block_size(self) -> int:
        """The longest context of any cell: what the text has to be long enough for."""
        return max(cell.config.model.block_size for cell in self.cells)


def find_study(name: str) -> Path:
    """The file of a study by its name or path. Raises UserError for a study that is not there."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    found = next((path for folder in (FOLDER, SHIPPED) if (path := folder / f"{name}.yaml").is_file()), None)
    if found is None:
        raise UserError(f"study {name!r}: not known; give one of {', '.join(STUDIES)}, or the path of a study file (YAML)")
    return found


def load_study(path: str | Path, overrides: list[str] | tuple[str, ...] = (), *, smoke: bool = False) -> StudyPlan:
    """Read a study file; resolve and check every cell of it.

    overrides: `study.FIELD=value` changes the file, `options.FIELD=value` its options, any other `section.field=value` the base
    experiment. What the arms and the grid vary stays theirs. Raises UserError.
    """
    path = Path(path)
    tree = read_yaml(path, "study file")
    at_smoke = tree.pop("smoke", None) or {}
    if smoke:
        tree = _laid_over(tree, at_smoke)
    tree |= _values_of("study", overrides, "study.seeds=[1,2]")
    if options := _values_of("options", overrides, "options.repeats=5"):
        tree["options"] = {**(tree.get("options") or {}), **options}
    of_base = [o for o in overrides if not o.startswith(("study.", "options."))]
    config = _checked(tree, path)
    base = with_changes(_without_short_forms(load_config(path.parent / config.base)), f"{path}: changes", **config.changes)
    base = with_overrides(base, of_base, str(path))
    return StudyPlan(config, base, tuple(_cells(config, base, path)))


def load_short(name: str, config: ExperimentConfig) -> StudyPlan:
    """A study's short form inside the run of `config`: experiments/studies/short/NAME.yaml on the run's own model, seed and text.

    A value `studies.FIELD` in it stands for that setting of the run. Raises UserError.
    """
    path = find_study(f"short/{name}")
    tree = _filled(read_yaml(path, "study file"), config.studies)
    plan = _checked({"base": "config.yaml", "seeds": [config.train.seed], "minutes": NO_END, **tree, "study": name}, path)
    base = with_changes(_without_short_forms(config), f"{path}: changes", **plan.changes)
    return StudyPlan(plan, base, tuple(_cells(plan, base, path)))


def _without_short_forms(config: ExperimentConfig) -> ExperimentConfig:
    """Short forms have demands of their own on an experiment; a cell's settings are the study's."""
    return with_changes(config, studies=dict.fromkeys(SHORT, False))


def _filled(value: Any, settings: Section) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, settings) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, settings) for inner in value]
    section, _, field = value.partition(".") if isinstance(value, str) else ("", "", "")
    return getattr(settings, field) if section == "studies" and hasattr(settings, field) else value


def write_plan(plan: StudyPlan, directory: Path) -> Path:
    """`study.yaml` and `config.yaml` that `load_study` reads back to the same cells, whatever happens to the originals."""
    directory.mkdir(parents=True, exist_ok=True)
    write_yaml(plan.base, directory / "config.yaml")
    resolved = plan.config.model_copy(update={"base": "config.yaml", "changes": {}})
    write_yaml(resolved, directory / "study.yaml")
    return directory / "study.yaml"


def _cells(config: StudyConfig, base: ExperimentConfig, path: Path) -> list[Cell]:
    cells = []
    points = [dict(zip(config.grid, values, strict=True)) for values in itertools.product(*config.grid.values())]
    for arm, point, seed in itertools.product(config.arms, points, config.seeds):
        changes: Changes = {section: dict(fields) for section, fields in arm.changes.items()}
        options = {**config.options, **arm.options}
        for key, value in point.items():
            section, name = key.split(".")
            (options if section == "options" else changes.setdefault(section, {}))[name] = value
        if changes.keys() & {"data", "vocab"}:
            raise UserError(f"{path}: arm {arm.name}: the cells of a study share one text; vary another section")
        changes.setdefault("train", {})["seed"] = seed
        where = f"{path}: arm {arm.name}" + "".join(f", {key}={value}" for key, value in point.items())
        resolved = with_changes(base, where, **changes)
        parts = [arm.name, *(f"{key.split('.')[1]}={value}" for key, value in point.items()), f"seed{seed}"]
        name = re.sub(r"[^A-Za-z0-9_.=+-]+", "_", "-".join(parts))
        cells.append(Cell(name, arm.name, point, seed, resolved, options))
    return cells


def _checked(tree: dict[str, Any], path: Path) -> StudyConfig:
    try:
        return StudyConfig.model_validate(tree)
    except ValidationError as error:
        told = []
        for e in error.errors():
            where = ".".join(map(str, e["loc"]))
            if e["type"] == "extra_forbidden":
                told.append(f"unknown key {where!r}; known keys: {', '.join([*StudyConfig.model_fields, 'smoke'])}")
            elif e["type"] == "value_error":
                told.append(str(e["ctx"]["error"]))
            elif e["type"] == "missing":
                told.append(f"{where} is missing")
            else:
                told.append(f"{where}={e['input']!r}: {e['msg'][:1].lower()}{e['msg'][1:]}")
        raise UserError(f"{path}: " + "; ".join(told)) from None


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` wins; `changes` and `options` are merged field by field, everything else is replaced."""
    merged = {**below, **above}
    if "options" in above:
        merged["options"] = {**(below.get("options") or {}), **above["options"]}
    if "changes" in above:
        merged["changes"] = lay_over(below.get("changes") or {}, above["changes"])
    return merged


def _values_of(section: str, overrides: list[str] | tuple[str, ...], example: str) -> dict[str, Any]:
    """Field → value of the overrides that begin with `section.`."""
    values = {}
    for override in (o.removeprefix(f"{section}.") for o in overrides if o.startswith(f"{section}.")):
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"override {override!r}: expected a field and a value, e.g. {example}")
        values[key] = read_value(text)
    return values

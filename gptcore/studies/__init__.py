"""Studies: a question, a base experiment, what is varied, and a measurement. One package a study.

What the author of a study needs is here; docs/extending.md is the recipe. A study is a folder beside this file whose `__init__` has
an object STUDY and a docstring that begins with what is measured, in a sentence. Its file is experiments/studies/NAME.yaml.

    gptloom study NAME                  # through Prefect and MLflow
    python -m gptcore.studies NAME      # without

No torch here, so that names and options cost milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.config import ExperimentConfig
from gptcore.config.base import Section
from gptcore.config.study import Cell, StudyPlan
from gptcore.journal import Journal

if TYPE_CHECKING:
    import pandas as pd

    from gptcore.device import Device
    from gptcore.shards import ShardSet
    from gptcore.studies.engine import Deadline
    from gptcore.studies.training import Trained

__all__ = ["Bench", "Brief", "Cell", "CellResult", "Draft", "Results", "Study", "Summary"]

DONE = ("done", "cached")
CELL_FILE = "cell.json"


@dataclass(frozen=True)
class Study:
    """A measurement: what its options are, how one cell is measured, what all cells together say.

    measure raises for what cannot be measured: an error is never a number. `version` is raised when it begins to measure
    differently, so that kept results are measured again. summarize is called only when at least one cell is done, and must
    live with any of the others missing. `brief` (in a file of that name) is for a study that `gptloom run` measures too, in the
    cells of experiments/studies/short/NAME.yaml; all of them are done then.
    """

    title: str
    options: type[Section]
    measure: Callable[[Cell, Bench], CellResult]
    summarize: Callable[[Results], Summary]
    version: int = 1
    brief: Callable[[Results], Brief] | None = None


@dataclass(frozen=True)
class Bench:
    """Where a cell is measured. Files written below `out` whose names the result lists are kept with it."""

    shards: ShardSet
    device: Device  # chosen for the cell's train.device and train.precision
    out: Path
    journal: Journal
    stop: Deadline
    home: Path
    own: Trained | None = None  # inside `gptloom run`: the run's training, which is what every cell asks for

    def train(self, config: ExperimentConfig) -> Trained:
        """The model that `config` trains on these shards: once, whichever cells and studies ask for it.

        Its curves stand in this cell's journal, too. Raises Stopped with a checkpoint kept, NonFinite, UserError.
        """
        from gptcore.studies.training import train

        if self.own is not None:
            return self.own
        return train(config, self.shards, self.home, self.journal, self.stop)


@dataclass(frozen=True)
class CellResult:
    """What one cell measured. A row is flat and JSON-able; the engine puts cell, arm, the grid's factors and seed in front."""

    rows: list[dict[str, Any]]  # the table "results"
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # further ones, e.g. "curves"
    metrics: dict[str, float] = field(default_factory=dict)  # compared between cells in MLflow
    files: tuple[str, ...] = ()  # below bench.out


@dataclass(frozen=True)
class Results:
    """All cells of a study run, also those that failed or were not reached."""

    plan: StudyPlan
    cells: list[dict[str, Any]]  # name, arm, factors, seed, status, reason, seconds, device, precision, rows, tables, metrics
    directory: Path

    def table(self, name: str = "results") -> pd.DataFrame:
        """All finished cells' rows of one table: columns cell, arm, one per grid factor, seed, then the rows' own."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for cell in self.cells:
            if cell["status"] in DONE:
                front = {"cell": cell["name"], "arm": cell["arm"], **cell["factors"], "seed": cell["seed"]}
                own = cell["rows"] if name == "results" else cell["tables"].get(name, [])
                rows += [{**front, **row} for row in own]
        return pd.DataFrame(rows)

    @property
    def arms(self) -> list[str]:
        """Names of arms with at least one finished cell, in the file's order."""
        done = {cell["arm"] for cell in self.cells if cell["status"] in DONE}
        return [arm.name for arm in self.plan.config.arms if arm.name in done]


@dataclass(frozen=True)
class Summary:
    """What the numbers say. Blocks are markup of `gptcore.report.page`, in order; tables are saved as CSV and Parquet."""

    conclusion: str  # one sentence, computed, with n and an interval
    findings: Sequence[str] = ()  # further sentences
    blocks: Sequence[str] = ()
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # of the study's own MLflow run


@dataclass(frozen=True)
class Brief:
    """What the report of `gptloom run` shows of a short form: a table under a title, and one sentence computed from it."""

    title: str
    rows: list[dict[str, Any]]  # a number x beside x_low and x_high is shown with its range
    conclusion: str
    metrics: dict[str, float] = field(default_factory=dict)  # to compare runs by, in MLflow
    caption: str = ""  # of the table
    facts: dict[str, float] = field(default_factory=dict)  # further numbers of the result


@dataclass
class Draft:
    """A summary in the making, for studies that say several things: each part adds its own."""

    findings: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def summary(self) -> Summary:
        """The first finding is the conclusion."""
        return Summary(self.findings[0], self.findings[1:], self.blocks, self.tables, self.metrics)

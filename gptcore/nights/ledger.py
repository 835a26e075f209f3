"""The drift ledger: every model that was ever champion, and tonight's, on every night's hold-out.

Read along a column, models change and the text stays: numbers that rise downwards are a regression. Read along a row, the
text changes and the model stays: numbers that rise to the right are data drift. A model that is better on its own night
and worse on the oldest ones forgets.
"""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.errors import UserError, first_line
from gptcore.nights.scores import load_scores, score_path
from gptcore.store import DamagedError, read_json, write_json

if TYPE_CHECKING:
    import plotly.graph_objects as go

FILE_NAME = "ledger.json"
NOTICEABLE = 0.01  # share by which a number must rise to be talked about


@dataclass
class Generation:
    """The text that one night brought. Its validation split is a hold-out, frozen from then on."""

    name: str  # hold-out's name: night-3
    segments: list[str]
    bytes: int
    is_accepted: bool = True
    reason: str = ""  # why not


@dataclass
class KnownModel:
    """A champion, of now or then, as a row of the matrix."""

    key: str  # its run
    version: str
    checkpoint: str


@dataclass
class Ledger:
    """What the nights of one experiment remember: $GPTLOOM_HOME/nightly/EXPERIMENT/ledger.json."""

    nights: list[dict[str, Any]] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    models: list[KnownModel] = field(default_factory=list)
    source_bytes: int = 0
    settings: str = ""

    @classmethod
    def load(cls, folder: Path) -> Ledger:
        """An empty one where there is none. Raises DamagedError: without its memory a night would judge by text that was trained on."""
        path = folder / FILE_NAME
        if not path.exists():
            return cls()
        try:
            tree = read_json(path)
            tree["generations"] = [Generation(**value) for value in tree["generations"]]
            tree["models"] = [KnownModel(**value) for value in tree["models"]]
            return cls(**tree)
        except (UserError, LookupError, TypeError) as error:
            raise DamagedError(
                f"{path}: damaged, what earlier nights held out is not known ({first_line(error)}); put a copy of it back, or move {folder} "
                "away, and the nights begin anew"
            ) from None

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE_NAME, asdict(self))

    @property
    def accepted(self) -> list[Generation]:
        return [generation for generation in self.generations if generation.is_accepted]

    @property
    def known_segments(self) -> set[str]:
        return {name for generation in self.generations for name in generation.segments}


@dataclass(frozen=True)
class Matrix:
    """bits per byte, `values[model][hold-out]`; None where a pair was not measured."""

    models: list[str]
    holdouts: list[str]
    values: list[list[float | None]]


def read_matrix(scores: Path, models: dict[str, str], holdouts: list[str]) -> Matrix:
    """Models as {key: label}, oldest first."""
    values: list[list[float | None]] = []
    for key in models:
        paths = [score_path(scores, key, holdout) for holdout in holdouts]
        values.append([load_scores(path).bpb if path.exists() else None for path in paths])
    return Matrix(list(models.values()), holdouts, values)


def explain(matrix: Matrix, champion: int, tonight: int) -> list[str]:
    """What the matrix says about tonight, in sentences: drift, regression, forgetting, or that there is none.

    champion, tonight: rows of the model in use before tonight and of tonight's model. The last column is tonight's text.
    """
    old, new = matrix.values[champion], matrix.values[tonight]
    known = [i for i in range(len(matrix.holdouts) - 1) if old[i] is not None and new[i] is not None]
    said = []
    before, now = [old[i] for i in known], old[-1]
    if before and now is not None:
        typical = sum(v for v in before if v is not None) / len(before)
        change = now / typical - 1
        if abs(change) > 5 * NOTICEABLE:
            said.append(
                f"Data drift: the same model, {matrix.models[champion]}, needs {now:.3f} bits per byte for tonight's text and "
                f"{typical:.3f} for earlier text ({100 * change:+.0f} %)."
            )
        else:
            said.append(
                f"No data drift: to {matrix.models[champion]} tonight's text is like earlier text ({100 * change:+.1f} %)."
            )
    worse = [i for i in known if (new[i] or 0) > (1 + NOTICEABLE) * (old[i] or 0)]
    better_now = old[-1] is not None and new[-1] is not None and new[-1] < old[-1]
    names = ", ".join(matrix.holdouts[i] for i in worse)
    if worse and better_now:
        said.append(f"Forgetting: {matrix.models[tonight]} is better on tonight's text and worse on {names}.")
    elif worse:
        said.append(f"Regression: {matrix.models[tonight]} is worse on {names}, and no better on tonight's text.")
    elif known:
        said.append(f"Neither regression nor forgetting: {matrix.models[tonight]} is worse on no earlier hold-out.")
    return said


def matrix_figure(matrix: Matrix) -> go.Figure:
    """The matrix as a heat map with its numbers."""
    import plotly.graph_objects as go

    figure = go.Figure(layout_template="none")
    figure.add_heatmap(
        x=[html.escape(name) for name in matrix.holdouts],
        y=[html.escape(name) for name in matrix.models],
        z=matrix.values,
        text=[["" if v is None else f"{v:.3f}" for v in row] for row in matrix.values],
        texttemplate="%{text}",
        colorscale="YlOrBr",
        colorbar={"title": "bits per byte"},
        hovertemplate="%{y} on %{x}: %{z:.4f}<extra></extra>",
    )
    figure.update_layout(
        height=140 + 44 * len(matrix.models),
        margin={"l": 170, "r": 20, "t": 20, "b": 60},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(title="text: the hold-out of", side="bottom")
    figure.update_yaxes(autorange="reversed")
    return figure


def draw_matrix(matrix: Matrix, path: Path, marked: int | None = None) -> Path:
    """The same as a PNG; row `marked` (the champion) in bold."""
    import numpy as np
    from matplotlib.figure import Figure

    z = np.array([[np.nan if v is None else v for v in row] for row in matrix.values], dtype=float)
    figure = Figure(figsize=(2.6 + 0.95 * len(matrix.holdouts), 1.5 + 0.42 * len(matrix.models)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(z, cmap="YlOrBr", aspect="auto")
    middle = 0.0 if np.isnan(z).all() else (np.nanmin(z) + np.nanmax(z)) / 2
    for (i, j), value in np.ndenumerate(z):
        text = "–" if np.isnan(value) else f"{value:.3f}"
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if value > middle else "black")
    axes.set_xticks(range(len(matrix.holdouts)), matrix.holdouts, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(matrix.models)), matrix.models, fontsize=8)
    if marked is not None:
        axes.get_yticklabels()[marked].set_fontweight("bold")
    axes.set(
        title="Bits per byte: each model on each night's held-out text (darker is worse)",
        xlabel="text held out by",
        ylabel="model",
    )
    axes.title.set_fontsize(9)
    figure.colorbar(image, ax=axes, shrink=0.9, label="bits per byte")
    figure.savefig(path, dpi=130)
    return path

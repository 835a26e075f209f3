"""Parts of the forms in the Prefect UI: experiments as a drop-down. The schema is made when `gptloom up` deploys.

python -c "from flows.forms import experiment_files; print(experiment_files())"
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.json_schema import WithJsonSchema

ROOT = Path(__file__).resolve().parent.parent


def experiment_files() -> list[str]:
    """The experiment files of this checkout, as flows name them."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "experiments").glob("*.yaml"))


def _schema() -> dict[str, Any]:
    return {
        "title": "Experiment",
        "anyOf": [
            {"type": "string", "enum": experiment_files(), "title": "One of experiments/"},
            {"type": "string", "minLength": 1, "title": "Another file"},
        ],
    }


Experiment = Annotated[
    str,
    WithJsonSchema(_schema()),
    Field(title="Experiment", description="Path of an experiment file (YAML), as seen from the repository's folder."),
]

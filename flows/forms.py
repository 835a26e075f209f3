"""Parts of the forms in the Prefect UI: titles, and experiments as a drop-down. The schema is made when `gptloom up` deploys.

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


def titled(title: str, **bounds: Any) -> Any:
    """A flow parameter's title in the form, and its bounds. Prefect itself titles a parameter by its name in the code, and takes the
    text below the title from the flow's docstring."""
    return Field(json_schema_extra={"title": title}, **bounds)


def one_of(names: list[str], title: str) -> WithJsonSchema:
    """A drop-down, with a field beside it for a file of one's own."""
    return WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "enum": names, "title": title},
                {"type": "string", "minLength": 1, "title": "Another file"},
            ]
        }
    )


Experiment = Annotated[str, one_of(experiment_files(), "One of experiments/"), titled("Experiment")]
StudyName = Annotated[
    str, one_of(["timing", "quantization", "accumulation", "rnn"], "One of experiments/studies/"), titled("Study")
]

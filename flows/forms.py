"""Parts of the forms in the Prefect UI: titles, and experiments as a drop-down. The schema is made when `gptloom up` deploys.

python -c "from gptloom.flows.forms import experiment_files; print(experiment_files())"
"""

from __future__ import annotations

import re
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    create_model,
    field_validator,
    model_serializer,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import SkipJsonSchema, WithJsonSchema

from gptcore.config import ExperimentConfig, refuse_secret
from gptcore.config.data import SECRET_FIELD
from gptcore.config.switches import STUDIES, SWITCHES
from gptloom import PACKAGE, find_project


def experiment_files() -> list[str]:
    """The experiment files of this project, as flows name them."""
    project = find_project() or PACKAGE
    return sorted(str(path.relative_to(project)) for path in (project / "experiments").glob("*.yaml"))


# Checked by the server when a run is created, before it stores the form: an address with a login, or with a secret query field.
# The letters twice, for a pattern has no flag in JSON.
_ANY_CASE = re.sub(r"(?<!\\)[a-z]", lambda found: f"[{found[0]}{found[0].upper()}]", SECRET_FIELD)
NO_SECRET: dict[str, Any] = {"pattern": rf"^(?![\s\S]*://(?:[^/?#\s]*@|[^#\s]*[?&]{_ANY_CASE}=[^&#\s]))"}


def titled(title: str, **bounds: Any) -> Any:
    """A flow parameter's title in the form, and its bounds. Prefect itself titles a parameter by its name in the code, and takes the
    text below the title from the flow's docstring."""
    return Field(json_schema_extra={"title": title}, **bounds)


def titled_text(title: str, **bounds: Any) -> Any:
    """`titled` for text: no secret may stand in it, for Prefect shows and keeps it in clear."""
    return Field(json_schema_extra={"title": title} | NO_SECRET, **bounds)


def one_of(names: list[str], title: str) -> WithJsonSchema:
    """A drop-down, with a field beside it for a file of one's own."""
    return WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "enum": names, "title": title},
                {"type": "string", "minLength": 1, "title": "Another file"} | NO_SECRET,
            ]
        }
    )


Experiment = Annotated[str, one_of(experiment_files(), "One of experiments/"), titled("Experiment")]
StudyName = Annotated[str, one_of(list(STUDIES), "One of experiments/studies/"), titled("Study")]

# "Left empty" as a type that Prefect's form shows as an empty input, not as a choice between a value and None. The switches
# of the studies keep that choice: an empty switch would look switched off.
Unset = SkipJsonSchema[None]


def _without_nulls(schema: dict[str, Any]) -> None:
    for field in schema["properties"].values():
        if "anyOf" not in field and field.get("default", ...) is None:
            del field["default"]


# What the form shows beside its list of other fields: its own name for a field → the field. Title, text, bounds and choices of
# each are those of the configuration's class.
SHOWN = {
    "data_source": "data.source",
    "max_steps": "train.max_steps",
    **{name: f"model.{name}" for name in ("n_layer", "n_head", "n_embd", "block_size")},
    **{name: f"train.{name}" for name in ("lr", "global_batch_size", "device", "seed")},
    **{name: f"studies.{name}" for name in SWITCHES},
}


def _form_field(where: str) -> tuple[Any, Any]:
    """A field of the configuration as one that may be left empty. Of several types it takes the first: a source, but no list."""
    section, name = where.split(".")
    model: Any = ExperimentConfig.model_fields[section].annotation
    field: FieldInfo = model.model_fields[name]
    kind: Any = field.annotation
    if get_origin(kind) in (Union, UnionType):
        kind = get_args(kind)[0]
    is_text = kind is str
    for bound in field.metadata:
        kind = Annotated[kind, bound]
    shown = Field(
        None, title=field.title, description=f"{where}: {field.description}", json_schema_extra=NO_SECRET if is_text else None
    )
    return kind | (None if kind is bool else Unset), shown


if TYPE_CHECKING:
    ShownFields = BaseModel
else:
    ShownFields = create_model("ShownFields", **{name: _form_field(where) for name, where in SHOWN.items()})


class Overrides(ShownFields):
    """What differs from the experiment file; empty fields keep the file's values."""

    # A value that is refused may hold a password: the error does not repeat it.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, json_schema_extra=_without_nulls, hide_input_in_errors=True)

    more: list[str] = Field(
        default_factory=list,
        title="Other fields",
        description="Any other field as section.field=value, e.g. train.warmup_steps=50.",
        json_schema_extra={"items": {"type": "string"} | NO_SECRET},
    )

    @field_validator("data_source", "more", check_fields=False)
    @classmethod
    def _no_secret(cls, value: str | list[str] | None) -> str | list[str] | None:
        for text in value if isinstance(value, list) else [value or ""]:
            refuse_secret(text)
        return value

    @model_serializer(mode="wrap")
    def _only_what_is_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}

    def as_list(self) -> list[str]:
        """The form as `section.field=value`, in the order in which they are applied."""
        values = self.model_dump(exclude={"more"}, exclude_none=True)
        return [f"{SHOWN[name]}={value}" for name, value in values.items()] + self.more


Changes = Annotated[Overrides, titled("Changes to the experiment")]
NO_OVERRIDES = Overrides()

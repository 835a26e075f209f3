"""Parts of the forms in the Prefect UI: titles, and experiments as a drop-down. The schema is made when `gptloom up` deploys.

python -c "from gptloom.flows.forms import experiment_files; print(experiment_files())"
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, field_validator, model_serializer
from pydantic.json_schema import SkipJsonSchema, WithJsonSchema

from gptcore.config import refuse_secret
from gptcore.config.switches import STUDIES
from gptloom import PACKAGE, find_project


def experiment_files() -> list[str]:
    """The experiment files of this project, as flows name them."""
    project = find_project() or PACKAGE
    return sorted(str(path.relative_to(project)) for path in (project / "experiments").glob("*.yaml"))


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
StudyName = Annotated[str, one_of(list(STUDIES), "One of experiments/studies/"), titled("Study")]

# "Left empty" as a type that Prefect's form shows as an empty input, not as a choice between a value and None. The switches
# of the studies keep that choice: an empty switch would look switched off.
Unset = SkipJsonSchema[None]


def _without_nulls(schema: dict[str, Any]) -> None:
    for field in schema["properties"].values():
        if "anyOf" not in field and field.get("default", ...) is None:
            del field["default"]


# Checked by the server when a run is created, before it stores the form.
NO_LOGIN: dict[str, Any] = {"pattern": r"^(?!.*://[^/?#\s]*@)"}


class Overrides(BaseModel):
    """What differs from the experiment file; empty fields keep the file's values."""

    # A value that is refused may hold a password: the error does not repeat it.
    model_config = ConfigDict(extra="forbid", json_schema_extra=_without_nulls, hide_input_in_errors=True)

    data_source: str | Unset = Field(
        None,
        title="Source of text",
        description="data.source: a text file, a folder (all its files of data.formats: txt, md, html, jsonl, csv, parquet), or "
        "package:NAME==VERSION/GLOB#sha256=HEX.",
        json_schema_extra=NO_LOGIN,
    )
    max_steps: Annotated[int, Field(ge=1)] | Unset = Field(
        None, title="Length (optimizer steps)", description="train.max_steps: where the training ends."
    )
    n_layer: Annotated[int, Field(ge=1)] | Unset = Field(None, title="Depth (layers)", description="model.n_layer: depth.")
    n_head: Annotated[int, Field(ge=1)] | Unset = Field(
        None, title="Attention heads", description="model.n_head: attention heads; must divide n_embd."
    )
    n_embd: Annotated[int, Field(ge=2)] | Unset = Field(
        None, title="Width (channels)", description="model.n_embd: width in channels."
    )
    block_size: Annotated[int, Field(ge=2)] | Unset = Field(
        None, title="Context (tokens)", description="model.block_size: context in tokens."
    )
    lr: Annotated[float, Field(gt=0)] | Unset = Field(
        None, title="Peak learning rate", description="train.lr: peak learning rate."
    )
    global_batch_size: Annotated[int, Field(ge=1)] | Unset = Field(
        None, title="Batch (sequences per step)", description="train.global_batch_size: sequences per optimizer step."
    )
    device: Literal["auto", "cpu", "cuda"] | Unset = Field(
        None, title="Device", description="train.device: auto takes a GPU if there is one."
    )
    seed: Annotated[int, Field(ge=0)] | Unset = Field(
        None, title="Seed", description="train.seed: weights, order of samples, dropout."
    )
    floor: bool | None = Field(None, title="Bigram floor", description="studies.floor: train the bigram floor.")
    timing: bool | None = Field(None, title="Timing map", description="studies.timing: map where a step's time goes.")
    quantization: bool | None = Field(None, title="int8 weights", description="studies.quantization: int8 weights.")
    accumulation: bool | None = Field(
        None, title="Accumulation study", description="studies.accumulation: one batch in several micro-steps."
    )
    rnn: bool | None = Field(None, title="LSTM baseline", description="studies.rnn: LSTM baseline.")
    more: list[str] = Field(
        default_factory=list,
        title="Other fields",
        description="Any other field as section.field=value, e.g. train.warmup_steps=50.",
        json_schema_extra={"items": {"type": "string"} | NO_LOGIN},
    )

    @field_validator("data_source", "more")
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
        sections = {
            "data": ["data_source"],
            "model": ["n_layer", "n_head", "n_embd", "block_size"],
            "studies": ["floor", "timing", "quantization", "accumulation", "rnn"],
        }
        where = {name: section for section, names in sections.items() for name in names}
        values = self.model_dump(exclude={"more"}, exclude_none=True)
        return [
            f"{where.get(name, 'train')}.{name.removeprefix('data_')}={value}" for name, value in values.items()
        ] + self.more


Changes = Annotated[Overrides, titled("Changes to the experiment")]
NO_OVERRIDES = Overrides()

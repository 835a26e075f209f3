"""Which studies there are, by their folders, and the experiment file's switches for those that run inside `gptloom run`.

Read from the sources by path: nothing is imported, so a name costs no torch.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from pydantic import Field, create_model

from gptcore.config.base import Section

PACKAGES = Path(__file__).parents[1] / "studies"
# A folder beside this file with this in it has a short form: rows and a sentence for the report of `gptloom run`.
BRIEF = "brief.py"


def _described() -> dict[str, str]:
    """Name → what is measured: the first line of its package's docstring."""
    found = {}
    for path in sorted(PACKAGES.glob("*/__init__.py")):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.parent.name] = doc.partition("\n")[0]
    return found


STUDIES = _described()
SHORT = tuple(name for name in STUDIES if (PACKAGES / name / BRIEF).is_file())


_fields: dict[str, Any] = {
    name: (bool, Field(True, title=f"{name.capitalize()} study", description=STUDIES[name])) for name in SHORT
}
_Switches: Any = create_model("_Switches", __base__=Section, **_fields)


class StudiesConfig(_Switches):
    """The research items of the notes, as `gptloom run` has them. Each can be switched off."""

    floor: bool = Field(
        True, title="Bigram floor", description="Train the bigram model: the floor every other model is compared with."
    )
    rnn: bool = Field(True, title="LSTM baseline", description="LSTM with the GPT's parameters and tokens.")
    accumulation_steps: int = Field(
        4, ge=2, le=1024, description="Micro-steps of the accumulation study's second arm; must divide train.global_batch_size."
    )
    repeats: int = Field(
        5, ge=3, le=1000, description="Timed repeats of each measurement, after one warm-up; medians and ranges are reported."
    )

    @property
    def short(self) -> tuple[str, ...]:
        """The studies whose short forms are on."""
        return tuple(name for name in SHORT if getattr(self, name))


# All that can be switched off, e.g. for a run that is to end on time.
SWITCHES = tuple(name for name, field in StudiesConfig.model_fields.items() if field.annotation is bool)

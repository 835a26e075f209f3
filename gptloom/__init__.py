"""What `pip install gptloom` brings beside the library `gptcore`: the command, the flows, the tasks, the experiments.

In a checkout the folders lie at its top and are linked from here; in a wheel they lie here. Either way their modules have one
name, `gptloom.flows.…` and `gptloom.tasks.…`, so that nothing of ours answers to a name that a user's own folder may have.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
NO_PROJECT = "is no gptloom project: `gptloom init DIR` lays one down, call this in it"


def find_project() -> Path | None:
    """The folder whose prefect.yaml and experiments/ count: the working folder if it is a project, or that above it in a project's
    experiments/, else the checkout that we run from; None outside of all."""
    checkout, here = (PACKAGE / "prefect.yaml").resolve().parent, Path.cwd()
    for folder in (here, *([here.parent] if here.name == "experiments" else []), checkout):
        if folder != PACKAGE and is_project(folder):
            return folder
    return None


def is_checkout(project: Path) -> bool:
    """Does a project bring its own code, as this repository does?"""
    return (project / "gptloom" / "__init__.py").is_file()


def is_project(folder: Path) -> bool:
    file = folder / "prefect.yaml"
    return file.is_file() and "name: gptloom" in file.read_text(encoding="utf-8", errors="replace").splitlines()

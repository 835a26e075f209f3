"""`gptloom init DIR`: a project folder for who installed the package and has no checkout.

    gptloom init my-models && cd my-models && gptloom up

What it lays down are the checkout's own files, which the package brings. Only what names the code reads otherwise, for no code lies
beside it: prefect.yaml names modules instead of files, and the Dockerfile installs the package.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gptcore.config import UserError
from gptcore.errors import EXIT_OK
from gptloom import PACKAGE

AS_THEY_ARE = (".dockerignore", ".env.example", "constraints.txt", "docker-compose.yml")
INSTALL = re.compile(r"^# The packages first.*?(?=^COPY \. \.$)", re.MULTILINE | re.DOTALL)
INSTALL_PACKAGE = """\
# gptloom and what it needs first: from a wheel file beside this one, else from the package index.
COPY constraints.txt *.whl ./
RUN pip install --no-cache-dir -c constraints.txt \\
    "$(ls ./gptloom-*.whl 2>/dev/null || echo gptloom=={version})[dask,postgres]"
"""


def init_project(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """`gptloom init`: all of it or nothing. Raises UserError for a folder that holds other things, or cannot be written."""
    target: Path = args.directory.expanduser().resolve()
    is_there = target.exists()
    try:
        # A repository or an environment (.git, .venv) may well be there first.
        others = (
            [path.name for path in target.iterdir() if not path.name.startswith(".") or path.name in AS_THEY_ARE]
            if is_there
            else []
        )
        if others:
            raise UserError(f"{target}: holds {min(others)} already; give a new folder, or an empty one")
        staging = Path(tempfile.mkdtemp(prefix=".gptloom-init-", dir=target if is_there else target.parent))
        try:
            write_project(staging)
            files = [str(path.relative_to(staging)) for path in files_of(staging)]
            if is_there:
                for path in sorted(staging.iterdir()):
                    path.rename(target / path.name)
            else:
                staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{target}: cannot be made ({error.strerror}); give a folder below one you can write to") from None
    result.update(project=str(target), files=files)
    print(
        f"{target} is a gptloom project. In it:\n"
        "  gptloom run experiments/smoke.yaml    # the whole pipeline in its smallest form, about a minute\n"
        "  gptloom up                            # Prefect and MLflow with their UIs, and a worker\n"
        "  docker compose up -d                  # the same in containers, once .env is made as .env.example says",
        file=sys.stderr,
    )
    return EXIT_OK


def write_project(folder: Path) -> None:
    """The project's files. They are no secret: modes as of any new file, whatever this command's own are."""
    for name in AS_THEY_ARE:
        shutil.copyfile(PACKAGE / name, folder / name)
    for path in files_of(PACKAGE / "experiments"):
        if path.suffix == ".yaml":
            copy = folder / path.relative_to(PACKAGE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    deployments = (PACKAGE / "prefect.yaml").read_text(encoding="utf-8")
    deployments = re.sub(r"(?<=entrypoint: )flows/(\w+)\.py:", r"gptloom.flows.\1:", deployments)
    deployments = deployments.replace(
        '"{{ $GPTLOOM_ROOT }}"', '"{{ $GPTLOOM_ROOT }}/experiments"'
    )  # flows/__init__.py says why
    (folder / "prefect.yaml").write_text(deployments, encoding="utf-8")
    dockerfile = (PACKAGE / "Dockerfile").read_text(encoding="utf-8")
    dockerfile = INSTALL.sub(lambda _: INSTALL_PACKAGE.format(version=version("gptloom")), dockerfile)
    (folder / "Dockerfile").write_text(dockerfile, encoding="utf-8")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())

"""Put a study's result into the repository: a page of Markdown, its tables, a picture of its report, an entry in the log.

    python -m gptcore.studies.publish RUN_DIR [--to docs/studies] [--log experiments/LOG.md]

Writes NAME.md, NAME/*.csv and, where a Chromium is installed, NAME/report.png, and puts the entry on top of the log. A second call
replaces the page and the tables, and leaves the log as it is.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from gptcore.config import UserError
from gptcore.config.study import load_study
from gptcore.entry import run_process
from gptcore.markdown import markdown_table
from gptcore.store import read_json

log = logging.getLogger(__name__)

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1200, 3100  # of the picture: question, answer, findings and the first figures
GAP, MARGIN = 30, 24  # empty rows between two figures; what is left around the drawn part
LARGEST_TABLE = 200_000  # bytes: what is larger (every point of every curve) stays with the run
SHOWN_ROWS = 40


def main(argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a study's folder below $GPTLOOM_HOME/runs")
    parser.add_argument("--to", type=Path, default=Path("docs/studies"), help="folder of published results")
    parser.add_argument("--log", type=Path, default=Path("experiments/LOG.md"), help="log of experiments")
    parser.add_argument("--name", help="file name (default: the study's)")
    args = parser.parse_args(argv)
    return publish(args.run, args.to, args.log, args.name)


def publish(run: Path, to: Path, log_file: Path, name: str | None = None) -> dict[str, Any]:
    """See above. Raises UserError for a run without a result, or one in which cells were not measured."""
    if not (run / "result.json").is_file():
        raise UserError(f"{run}: no study's result in it; run the study, or write its report with gptcore.studies.finish")
    result = read_json(run / "result.json")
    if result["not_run"]:
        raise UserError(f"{run}: {result['not_run']} of {result['cells']} cells were not measured; run the study again first")
    name = name or result["study"]
    folder = to / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tables = []
    for path in sorted((run / "tables").glob("*.csv")):
        if path.stat().st_size <= LARGEST_TABLE:
            shutil.copyfile(path, folder / path.name)
            tables.append(path.name)
    has_picture = take_picture(run / "report.html", folder / "report.png")
    page = to / f"{name}.md"
    page.write_text(markdown(run, result, name, tables, has_picture), encoding="utf-8")
    is_new = add_to_log(log_file, (run / "log_entry.md").read_text(encoding="utf-8"))
    return {"page": str(page), "tables": tables, "picture": has_picture, "logged": is_new}


def markdown(run: Path, result: dict[str, Any], name: str, tables: list[str], has_picture: bool) -> str:
    """The page: question, answer, findings, the command, the summary tables."""
    plan = load_study(run / "study.yaml")
    entry = (run / "log_entry.md").read_text(encoding="utf-8").splitlines()
    lines = [f"# {entry[0].partition('· ')[2]}", "", f"*{plan.config.question}*", "", f"**{result['conclusion']}**", ""]
    lines += [*(f"- {finding}" for finding in result["findings"]), ""]
    lines += [entry[2].removeprefix(plan.config.question).strip(), ""]
    if has_picture:
        lines += [f"![report]({name}/report.png)", ""]
    for table in tables:
        frame = pd.read_csv(run / "tables" / table)
        link = f"[{table}]({name}/{table})"
        if len(frame) <= SHOWN_ROWS and table != "cells.csv" and frame.shape[1] <= 14:
            rows = [[_shown(value) for value in row] for row in frame.itertuples(index=False)]
            title = table.removesuffix(".csv").replace("_", " ")
            lines += [f"## {title}", "", markdown_table(rows, list(frame.columns)), "", link, ""]
        else:
            lines += [f"{link}: {len(frame)} rows", ""]
    return "\n".join(lines).rstrip() + "\n"


def add_to_log(path: Path, entry: str) -> bool:
    """The entry on top of the newest one; False where it is there already."""
    text = path.read_text(encoding="utf-8")
    if entry.strip() in text:
        return False
    head, mark, rest = text.partition("\n## ")
    path.write_text(f"{head.rstrip()}\n\n{entry.strip()}\n{mark}{rest}", encoding="utf-8")
    return True


def take_picture(page: Path, target: Path) -> bool:
    """The upper part of the page as a small PNG; False, with a line in the log, where no browser is installed or it fails."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        log.warning("no picture: none of %s is installed", ", ".join(BROWSERS))
        return False
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless=new", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={profile}"]
        command += [f"--screenshot={target.resolve()}", f"--window-size={WIDTH},{HEIGHT}", page.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, timeout=120)
    if done.returncode or not target.is_file():
        log.warning("no picture: %s ended with exit code %d", browser, done.returncode)
        return False
    _cut(target)
    return True


def _cut(picture: Path) -> None:
    """Kept small for a repository: what is drawn, up to the last whole figure, in 256 colours."""
    import numpy as np
    from PIL import Image

    image = Image.open(picture).convert("RGB")
    pixels = np.asarray(image)
    drawn = (pixels != pixels[0, 0]).any(axis=2)
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    # A page that is longer than the picture is cut between two figures; titles and captions stand closer to theirs.
    ends = np.flatnonzero(np.diff(rows) > GAP)
    bottom = int(rows[-1] if rows[-1] < len(pixels) - GAP else rows[ends[-1]]) + MARGIN
    box = (max(0, int(columns[0]) - MARGIN), 0, int(columns[-1]) + MARGIN, bottom)
    image.crop(box).quantize(256, dither=Image.Dither.NONE).save(picture, optimize=True)


def _shown(value: Any) -> str:
    return "–" if pd.isna(value) else f"{value:.5g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(run_process(main))

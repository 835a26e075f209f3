"""`python -m gptcore.report RUN_DIR`: write the report of a run that is already on disk."""

from pathlib import Path

from gptcore.config import UserError
from gptcore.entry import run_process
from gptcore.report.run import headline, write_report


def main(argv: list[str]) -> dict[str, str]:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("usage: python -m gptcore.report RUN_DIR (a folder of $GPTLOOM_HOME/runs)")
    run_dir = Path(argv[0])
    return {"report": str(write_report(run_dir).resolve()), "headline": headline(run_dir)}


if __name__ == "__main__":
    raise SystemExit(run_process(main))

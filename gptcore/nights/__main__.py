"""See gptcore/nights/night.py."""

from gptcore.entry import run_process
from gptcore.nights.night import main

raise SystemExit(run_process(main))

"""See gptcore/nights/night.py."""

from gptcore.entry import run_process
from gptcore.nights.night import main

if __name__ == "__main__":  # the fork server imports this file as well
    raise SystemExit(run_process(main))

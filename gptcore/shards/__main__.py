"""`python -m gptcore.shards CONFIG.yaml`: corpus, vocabulary and shards, built or found; prints where they are."""

from gptcore.entry import run_process
from gptcore.shards import main

if __name__ == "__main__":
    raise SystemExit(run_process(main))

"""`python -m gptcore.vocab CONFIG.yaml`: builds the vocabulary, or finds it, and prints its manifest."""

from gptcore.entry import run_process
from gptcore.vocab import main

if __name__ == "__main__":
    raise SystemExit(run_process(main))

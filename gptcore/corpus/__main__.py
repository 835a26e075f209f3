"""`python -m gptcore.corpus CONFIG.yaml [section.field=value …]`: build the corpus, print its manifest."""

from gptcore.corpus import main
from gptcore.entry import run_process

if __name__ == "__main__":
    raise SystemExit(run_process(main))

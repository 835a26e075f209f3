"""`python -m gptcore.corpus CONFIG.yaml [section.field=value …]`: build the corpus, print its manifest."""

from gptcore.corpus import build_corpus
from gptcore.entry import read_experiment, run_process
from gptcore.store import make_home, read_manifest

if __name__ == "__main__":
    raise SystemExit(run_process(lambda argv: read_manifest(build_corpus(read_experiment(argv).data, make_home()))))

"""`python -m gptcore.vocab CONFIG.yaml [section.field=value …]`: corpus and vocabulary, built or found; prints the manifest."""

from typing import Any

from gptcore.corpus import build_corpus
from gptcore.entry import read_experiment, run_process
from gptcore.store import make_home, read_manifest
from gptcore.vocab import build_vocab


def main(argv: list[str]) -> dict[str, Any]:
    config, home = read_experiment(argv), make_home()
    return read_manifest(build_vocab(config.vocab, build_corpus(config.data, home), home))


if __name__ == "__main__":
    raise SystemExit(run_process(main))

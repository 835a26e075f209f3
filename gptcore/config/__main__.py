"""`python -m gptcore.config FILE.yaml [section.field=value …]` prints the resolved tree."""

import sys

import gptcore.config
from gptcore.config import UserError, dump_yaml, load_config


def main(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(gptcore.config.__doc__, file=sys.stderr)
        return 2
    try:
        sys.stdout.write(dump_yaml(load_config(argv[0], argv[1:])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


raise SystemExit(main(sys.argv[1:]))

"""`python -m gptcore.config FILE.yaml [section.field=value …]` prints the resolved tree."""

from gptcore.config import main

raise SystemExit(main())

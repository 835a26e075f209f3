"""Rows of text as a table of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(rows: Iterable[Iterable[object]], columns: Sequence[str]) -> str:
    """A table whose first column names the rows; the others, numbers mostly, stand to the right."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in [columns, rule, *rows])

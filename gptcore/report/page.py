"""Text, tables and figures → one HTML file. All parts are small functions that return safe markup and can be nested.

Everything goes through markupsafe: what is not markup already is escaped, so a sample that holds a script is shown, never run.
A content policy in the page forbids every request to anywhere, so the file says the same offline and in ten years.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import plotly.offline
from markupsafe import Markup

from gptcore.report.theme import SCRIPT, STYLE
from gptcore.report.wording import keep_together

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
_EMPTY = Markup()


def join(parts: Iterable[str], separator: str = "\n") -> Markup:
    """Parts one after the other; what is not markup is escaped."""
    return Markup(separator).join(parts)


def section(title: str, *blocks: str, intro: str = "") -> Markup:
    """A titled part of the page."""
    lead = paragraph(intro, "intro") if intro else _EMPTY
    return Markup("<section>\n<h2>{}</h2>\n{}\n{}\n</section>").format(title, lead, join(blocks))


def subsection(title: str, *blocks: str) -> Markup:
    """A titled part of a section."""
    return Markup('<div class="sub">\n<h3>{}</h3>\n{}\n</div>').format(title, join(blocks))


def paragraph(text: str, css_class: str = "") -> Markup:
    """A paragraph of text."""
    text = keep_together(text)
    return Markup('<p class="{}">{}</p>').format(css_class, text) if css_class else Markup("<p>{}</p>").format(text)


def callout(title: str, text: str, kind: str = "bad") -> Markup:
    """A message one must not miss. `kind` is bad or good."""
    return Markup('<div class="callout {}" role="note"><strong>{}</strong> <span>{}</span></div>').format(kind, title, text)


def tiles(values: Sequence[tuple[str, str, str]]) -> Markup:
    """Key numbers side by side: (label, value, note)."""
    tile = Markup('<div class="tile"><dt>{}</dt><dd>{}</dd><dd class="note">{}</dd></div>')
    return Markup('<dl class="tiles">\n{}\n</dl>').format(join(tile.format(*value) for value in values))


def chips(values: Sequence[tuple[str, str, str]]) -> Markup:
    """The state of several steps at a glance: (name, state, note); the state is also a CSS class."""
    chip = Markup('<li class="chip {}"><b>{}</b> <span>{}</span></li>')
    return Markup('<ul class="chips">\n{}\n</ul>').format(join(chip.format(state, name, note) for name, state, note in values))


def facts(values: Mapping[str, object]) -> Markup:
    """Names and values as a list of definitions."""
    pair = Markup("<div><dt>{}</dt><dd>{}</dd></div>")
    return Markup('<dl class="facts">\n{}\n</dl>').format(join(pair.format(k, v) for k, v in values.items()))


def html_table(
    frame: pd.DataFrame,
    caption: str,
    *,
    text_columns: Iterable[str] = (),
    bars: Mapping[str, Sequence[float]] | None = None,
    notes: Sequence[str] = (),
) -> Markup:
    """A table of ready-made texts; the first column names the rows.

    Columns outside `text_columns` are numbers and align right. `bars` draws a bar of length 0 to 1 under each cell of a
    column (nan: none). `notes` stand below the table.
    """
    columns = [str(column) for column in frame.columns]
    left = {columns[0], *text_columns}
    classes = {column: "text" if column in left else "number" for column in columns}
    head = join(Markup('<th scope="col" class="{}">{}</th>').format(classes[c], c) for c in columns)
    body = []
    for i, row in enumerate(frame.itertuples(index=False)):
        cells = []
        for j, value in enumerate(row):
            column = columns[j]
            bar = _bar(bars[column][i]) if bars and column in bars else _EMPTY
            tag = Markup('<th scope="row" class="{}">{}{}</th>' if j == 0 else '<td class="{}">{}{}</td>')
            cells.append(tag.format(classes[column], value, bar))
        body.append(Markup("<tr>{}</tr>").format(join(cells, "")))
    table = Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="{}">\n<table>\n<caption><span>{}</span></caption>\n'
        "<thead><tr>{}</tr></thead>\n<tbody>\n{}\n</tbody>\n</table>\n</div>"
    ).format(caption, caption, head, join(body))
    return join([table, *(paragraph(note, "tablenote") for note in notes)])


def _bar(share: float) -> Markup:
    if pd.isna(share):
        return _EMPTY
    return Markup('<span class="bar" aria-hidden="true"><i style="width:{}%"></i></span>').format(
        f"{100 * min(max(share, 0), 1):.1f}"
    )


def figure_block(figure: go.Figure, title: str, caption: str, *, alt: str, scale_toggle: bool = False) -> Markup:
    """A plot with its title, a caption for everyone and `alt`, what it shows in words, for who cannot see it.

    `scale_toggle` adds two buttons that switch the horizontal axis between linear and logarithmic.
    """
    # "<" is the only character that could end the script element early.
    data = Markup(str(figure.to_json()).replace("<", "\\u003c"))
    toggle = Markup(
        '<span class="toggle" role="group" aria-label="Scale of the horizontal axis">'
        '<button type="button" data-scale="linear" aria-pressed="true">linear</button>'
        '<button type="button" data-scale="log" aria-pressed="false">log</button></span>'
    )
    return Markup(
        '<figure>\n<div class="figurehead"><h3>{title}</h3>{toggle}</div>\n'
        '<div class="plot" role="img" aria-label="{alt}" style="min-height:{height}px"></div>\n'
        '<script type="application/json">{data}</script>\n<figcaption>{caption}</figcaption>\n</figure>'
    ).format(
        title=title,
        toggle=toggle if scale_toggle else _EMPTY,
        alt=alt,
        height=figure.layout.height or 400,
        data=data,
        caption=keep_together(caption),
    )


def figure_row(*figures: str) -> Markup:
    """Small plots side by side, one under the other on a narrow screen."""
    return Markup('<div class="row">\n{}\n</div>').format(join(figures))


def text_blocks(texts: Sequence[str], label: str) -> Markup:
    """Texts exactly as they are, monospaced, numbered: `label` 1, `label` 2, …"""
    block = Markup('<figure class="sample"><figcaption>{} {}</figcaption><pre tabindex="0">{}</pre></figure>')
    # A line feed directly after <pre> is dropped by every browser: give it one to drop.
    return join(block.format(label, i, "\n" + text) for i, text in enumerate(texts, 1))


def collapsible(summary: str, block: str) -> Markup:
    """Closed until asked for; printed only when open."""
    return Markup("<details><summary>{}</summary>\n{}\n</details>").format(summary, block)


def preformatted(text: str) -> Markup:
    return Markup('<pre tabindex="0">{}</pre>').format("\n" + text)


def page(title: str, lead: str, blocks: Iterable[str], *, kind: str = "Run report", footer: str = "") -> Markup:
    """A whole HTML document: `lead` is the sentence to remember. plotly.js is put inside only when there is a plot."""
    body = join(blocks)
    library = _EMPTY
    if 'class="plot"' in body:
        library = Markup("<script>{}</script>\n<script>{}</script>").format(
            Markup(plotly.offline.get_plotlyjs()), Markup(SCRIPT)
        )
    return Markup(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        "<title>{title} · gptloom</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        '<header>\n<p class="kind">gptloom · {kind}</p>\n<h1>{title}</h1>\n<p class="lead">{lead}</p>\n</header>\n'
        "{body}\n<footer>{footer}</footer>\n</main>\n{library}\n</body>\n</html>\n"
    ).format(
        policy=Markup(POLICY),
        title=title,
        style=Markup(STYLE),
        kind=kind,
        lead=keep_together(lead),
        body=body,
        footer=footer,
        library=library,
    )


def write_page(path: Path, html: str) -> Path:
    """Write through a temporary name, so that a reader never sees half a page."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A lone surrogate in a sample must not cost the report.
        tmp.write_text(html, encoding="utf-8", errors="replace")
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)
    return path

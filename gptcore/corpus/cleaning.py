"""What counts as text, and what is done to it: UTF-8 without byte order mark, line ends \\n, and the rules of `data`.

Every rule that changes or leaves out a document counts it under its name; the manifest has the counts.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from gptcore.config import DataConfig, UserError
from gptcore.corpus.formats import NotText, html_text

BOM = b"\xef\xbb\xbf"
CONTROLS = bytes(set(range(32)) - set(b"\t\n\r\f\v\x1b")) + b"\x7f"
CONTROL_SHARE = 0.1  # of a text's first 4,096 bytes; binary formats without any NUL have more
# Project Gutenberg's own lines, as its files have them since about 2003.
GUTENBERG_START = re.compile(rb"^\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG[^\n]*\n", re.M)
GUTENBERG_END = re.compile(rb"^\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG", re.M)
GUTENBERG_TITLE = re.compile(rb"^Title: *([^\r\n]+)", re.M)
GUTENBERG_HEAD = 64 << 10  # where its first line must stand
CONVERT = "convert it to UTF-8, set data.invalid_text=replace"


def clean(
    name: str, title: str, raw: bytes | NotText, is_html: bool, data: DataConfig, counts: Counter[str]
) -> tuple[str, bytes]:
    """(title, text) after all rules; the text is empty where the document is left out.

    Raises UserError for a text that is none, with invalid_text=strict.
    """
    try:
        text = _as_utf8(raw, data, counts)
        if is_html and text:
            text = html_text(text)
    except NotText as problem:
        if data.invalid_text == "skip":
            counts["invalid"] += 1
            return title, b""
        raise UserError(
            f"data.source: {name}: not UTF-8 text ({problem}); {problem.way_out}, or set data.invalid_text=skip"
        ) from None
    if data.strip_gutenberg:
        title, text = _strip_gutenberg(title, text, counts)
    if data.unicode_form != "none" and not text.isascii():
        changed = unicodedata.normalize(data.unicode_form.upper(), text.decode()).encode()  # type: ignore[arg-type]
        counts["normalised"] += changed != text
        text = changed
    if data.whitespace != "keep":
        changed = _tidy(text, data.whitespace)
        counts["whitespace"] += changed != text
        text = changed
    if len(text) < data.min_bytes:
        counts["short" if text else "empty"] += 1
        return title, b""
    return title, text


def _as_utf8(raw: bytes | NotText, data: DataConfig, counts: Counter[str]) -> bytes:
    if isinstance(raw, NotText):
        raise raw
    reason = why_not_text(raw)
    if reason:
        if data.invalid_text != "replace":
            raise NotText(reason, CONVERT)
        counts["replaced"] += 1
        raw = raw.decode("utf-8", errors="replace").replace("\0", "\ufffd").encode()
    raw = raw.removeprefix(BOM)
    return raw.replace(b"\r\n", b"\n") if b"\r" in raw else raw


def why_not_text(raw: bytes) -> str:
    """Empty for UTF-8 text, else the first thing that no text has."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "it begins like UTF-16"
    nul = raw.find(0)
    if nul >= 0:
        return f"byte {nul} is NUL"
    head = raw[:4096]
    if len(head) - len(head.translate(None, CONTROLS)) > CONTROL_SHARE * len(head):
        return "it begins with control characters, as binary files do"
    if raw.isascii():
        return ""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"byte {error.start} is 0x{raw[error.start]:02x}"
    return ""


def _strip_gutenberg(title: str, text: bytes, counts: Counter[str]) -> tuple[str, bytes]:
    if b"PROJECT GUTENBERG" not in text[:GUTENBERG_HEAD]:
        return title, text
    start = GUTENBERG_START.search(text[:GUTENBERG_HEAD])
    if start is None:
        return title, text
    end = GUTENBERG_END.search(text, start.end())
    named = GUTENBERG_TITLE.search(text[: start.start()])
    counts["gutenberg"] += 1
    body = text[start.end() : end.start() if end else len(text)].strip(b"\n")
    return named.group(1).decode().strip() if named else title, body + b"\n" if body else b""


def _tidy(text: bytes, how: str) -> bytes:
    # Line by line: a regular expression for blanks before a line end takes the square of a long run's length.
    lines = text.split(b"\n")
    lines = [b" ".join(line.split()) for line in lines] if how == "collapse" else [line.rstrip() for line in lines]
    text = re.sub(rb"\n{3,}", b"\n\n", b"\n".join(lines)).strip(b"\n")
    return text + b"\n" if text else b""

"""Documents from one opened file: plain text and Markdown, HTML, JSON lines, CSV, Parquet.

Each reader yields (title, raw bytes) in the file's order and holds one document, or one block of rows, at a time. A long
plain text becomes several documents of about 8 MiB, cut at a blank line near fixed places, so that its parts can be read
side by side and are the same whether the file is compressed or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from gptcore.config import DataConfig, UserError
from gptcore.corpus.containers import Kind, Member, check_expansion, seekable
from gptcore.corpus.sections import BLANK_LINES, character_start

PART_BYTES = 8 << 20  # a plain text is cut near every multiple of this
PART_WINDOW = 1 << 20  # how far from there a blank line is looked for
CSV_BLOCK = 16 << 20  # longest row
PARQUET_ROWS = 512
MAX_HTML_DEPTH = 5000  # parsing costs the square of it
HTML_TAG = re.compile(rb"<(/?)([a-zA-Z][a-zA-Z0-9-]*)[^<>]*?(/?)>")
# Elements that need no end tag, so that their number says nothing about the depth.
FLAT_TAGS = frozenset(
    b"area base br col embed hr img input link meta source track wbr p li dd dt option tr td th tbody thead tfoot".split()
)
INLINE_TAGS = ["a", "abbr", "acronym", "b", "bdi", "bdo", "big", "cite", "code", "data", "del", "dfn", "em", "font", "i"]
INLINE_TAGS += ["ins", "kbd", "mark", "q", "s", "samp", "small", "span", "strike", "strong", "sub", "sup", "time", "tt"]
INLINE_TAGS += ["u", "var", "wbr"]
UNSEEN_TAGS = ["script", "style", "noscript", "template", "svg", "head"]


class NotText(Exception):
    """One document that cannot be read as text; the rest of its file can. The message says why.

    `way_out` is what the user can do, beside leaving it out.
    """

    def __init__(self, reason: str, way_out: str = "mend it") -> None:
        super().__init__(reason)
        self.way_out = way_out


Raw = tuple[str, bytes | NotText]


def read_member(member: Member, text_column: str, data: DataConfig, file_bytes: int) -> Iterator[Raw]:
    """The documents of one file or archive member; a document that is no text comes as a NotText in its place.

    Raises UserError for a missing column, and beyond a limit; the library's error for damage.
    """
    title = title_of(member.name)
    if member.format in ("txt", "md"):
        yield from read_text_parts(title, member.stream)
    elif member.format == "html":
        page = member.stream.read(data.max_document_bytes + 1)
        yield title, too_long(page, data) or page
    elif member.format == "jsonl":
        yield from ((title, raw) for raw in read_json_lines(member.name, member.stream, None, text_column, data))
    elif member.format == "csv":
        yield from ((title, raw) for raw in _read_csv(member, text_column, data))
    else:
        with seekable(member.name, member.stream, data) as file:
            yield from ((title, raw) for raw in read_parquet(member.name, file, None, text_column, data, file_bytes))


def title_of(name: str) -> str:
    """A file's name without folders and known extensions."""
    base = name[name.rfind("/") + 1 :]
    kind = Kind.of(base)
    while "." in base[1:] and (kind.compressions or kind.inner):
        base = base[: base.rindex(".")]
        kind = Kind.of(base)
    return base


def too_long(raw: bytes, data: DataConfig) -> NotText | None:
    if len(raw) > data.max_document_bytes:
        return NotText(f"longer than data.max_document_bytes={data.max_document_bytes}", "raise the limit")
    return None


def read_text_parts(title: str, stream: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """A text in parts, each cut where `part_end` says; most texts are one part."""
    base, buffer, number = 0, b"", 1
    while True:
        target = (base // PART_BYTES + 1) * PART_BYTES - base
        missing = target + PART_WINDOW - len(buffer)
        if missing > 0:
            buffer += stream.read(missing)
        if len(buffer) <= target:
            if buffer or number == 1:
                yield _numbered(title, number), buffer
            return
        end = target + part_end(buffer[target : target + PART_WINDOW])
        yield _numbered(title, number), buffer[:end]
        base, buffer, number = base + end, buffer[end:], number + 1


def read_text_part(title: str, stream: BinaryIO, number: int) -> tuple[str, bytes]:
    """Part `number` (0, 1, …) alone, from a file one can seek in: what `read_text_parts` yields there."""
    begin = number * PART_BYTES
    stream.seek(begin)
    buffer = stream.read(PART_BYTES + PART_WINDOW)
    start = part_end(buffer[:PART_WINDOW]) if number else 0
    end = PART_BYTES + part_end(buffer[PART_BYTES:]) if len(buffer) > PART_BYTES else len(buffer)
    return _numbered(title, number + 1), buffer[start:end]


def part_end(window: bytes) -> int:
    """Where a text is cut in the bytes after a multiple of PART_BYTES: after blank lines, else a line, else a character."""
    blank = BLANK_LINES.search(window)
    if blank:
        return blank.end()
    line = window.find(b"\n")
    if line >= 0:
        return line + 1
    return character_start(window, len(window) - 1) if len(window) == PART_WINDOW else len(window)


def read_json_lines(name: str, stream: BinaryIO, part: int | None, column: str, data: DataConfig) -> Iterator[bytes | NotText]:
    """`column` of each line's object. With `part`, the lines that begin in that multiple of PART_BYTES."""
    import orjson

    position, end = 0, None
    if part is not None:
        position, end = max(part * PART_BYTES - 1, 0), (part + 1) * PART_BYTES
        stream.seek(position)
        while part and (line := _read_line(stream, data)):  # what began before belongs to the part before
            position += len(line)
            if line.endswith(b"\n"):
                break
    while end is None or position < end:
        line = _read_line(stream, data)
        if not line:
            return
        begin, position = position, position + len(line)
        if line.isspace():
            continue
        problem = too_long(line, data)
        if problem:
            yield problem
            while not line.endswith(b"\n") and (line := _read_line(stream, data)):
                position += len(line)
            continue
        try:
            value = orjson.loads(line.removeprefix(b"\xef\xbb\xbf") if begin == 0 else line)
        except orjson.JSONDecodeError as error:
            yield NotText(f"byte {begin} begins a line that is not JSON ({error.msg})")
            continue
        if isinstance(value, dict) and column not in value and begin == 0:
            raise _no_column(name, column, list(value))
        text = value.get(column, "") if isinstance(value, dict) else value
        if text is None or isinstance(text, str):
            yield (text or "").encode()
        else:
            yield NotText(f"byte {begin} begins a line whose {column!r} is not a string")


def _read_line(stream: BinaryIO, data: DataConfig) -> bytes:
    return stream.readline(data.max_document_bytes + 1)


def _read_csv(member: Member, column: str, data: DataConfig) -> Iterator[bytes | NotText]:
    import pyarrow as pa
    from pyarrow import csv

    bad_rows: list[str] = []

    def note(row: Any) -> str:
        bad_rows.append(f"{row.actual_columns} columns in a row, {row.expected_columns} in the first")
        return "skip"

    read = csv.ReadOptions(block_size=CSV_BLOCK, use_threads=False)
    delimiter = "\t" if member.extension == "tsv" else ","
    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note)
    convert = csv.ConvertOptions(include_columns=[column], column_types={column: pa.large_binary()})
    try:
        reader = csv.open_csv(member.stream, read, parse, convert)
    except KeyError:
        raise UserError(f"{member.name}: no column {column!r}; name the one that holds text with data.text_column") from None
    except pa.ArrowInvalid as error:
        # pyarrow has one class and no code for all that is wrong with a table: its words tell an empty one from a damaged one.
        if "Empty CSV" in str(error):
            return
        raise
    for batch in reader:
        yield from (_cell(value, data) for value in batch.column(0).to_pylist())
        yield from (NotText(reason) for reason in bad_rows)
        bad_rows.clear()


def read_parquet(
    name: str, file: BinaryIO, row_groups: list[int] | None, column: str, data: DataConfig, file_bytes: int
) -> Iterator[bytes | NotText]:
    """`column` of each row, or of some row groups' rows, a few hundred rows at a time."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True) as table:
        names = table.schema_arrow.names
        if column not in names:
            raise _no_column(name, column, names)
        kind = table.schema_arrow.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)):
            raise UserError(f"{name}: column {column!r} holds {kind}, not text; name another with data.text_column")
        count = 0
        for batch in table.iter_batches(PARQUET_ROWS, row_groups=row_groups, columns=[column], use_threads=False):
            values = pc.cast(batch.column(0), pa.large_binary())
            count += values.nbytes
            check_expansion(count, file_bytes, name, data)
            yield from (_cell(value, data) for value in values.to_pylist())


def _cell(value: bytes | None, data: DataConfig) -> bytes | NotText:
    value = value or b""
    return too_long(value, data) or value


def html_text(raw: bytes) -> bytes:
    """The text a reader of the page sees, a line per block. Raises NotText for nesting no page has.

    The tree is selectolax's (Lexbor), which mends broken HTML as browsers do.
    """
    from selectolax.lexbor import LexborHTMLParser

    depth = 0
    for closing, tag, closed in HTML_TAG.findall(raw):
        if closed or tag.lower() in FLAT_TAGS:
            continue
        depth = max(depth - 1, 0) if closing else depth + 1
        if depth > MAX_HTML_DEPTH:
            raise NotText(f"HTML nested more than {MAX_HTML_DEPTH} deep")
    tree = LexborHTMLParser(raw)
    if tree.body is None:
        return b""
    tree.strip_tags(UNSEEN_TAGS)
    tree.unwrap_tags(INLINE_TAGS)
    tree.merge_text_nodes()
    lines = (tree.body.text(separator="\n") if tree.body else "").splitlines()
    return "\n".join(line for line in map(str.strip, lines) if line).encode()


def _no_column(name: str, column: str, columns: list[str]) -> UserError:
    known = ", ".join(map(str, columns[:20])) or "none"
    return UserError(f"{name}: no column {column!r}, there are {known}; name the one with data.text_column")


def _numbered(title: str, number: int) -> str:
    return title if number == 1 else f"{title} ({number})"

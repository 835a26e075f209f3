"""Where text comes from: one file, a folder of .txt files, or the files of a source package; and what counts as text.

A further kind of source is one more branch of `read_source`: it yields (name, raw bytes) in an order that does not
depend on the machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from gptcore.config import UserError
from gptcore.corpus.package_index import PREFIX, read_package


def read_source(source: str, home: Path) -> Iterator[tuple[str, bytes]]:
    """Every file of `data.source` as (name, raw bytes), sorted by name within a folder or package.

    Raises UserError for a source that does not exist, holds no text file, cannot be read or cannot be fetched.
    """
    if source.startswith(PREFIX):
        yield from read_package(source, home)
        return
    if "://" in source:
        raise UserError(
            "data.source: an address is not a source; download the text and give its path with data.source=PATH"
        )
    path = Path(source).expanduser()
    if path.is_dir():
        for name in _text_files(path, source):
            yield name, _read_bytes(path / name, source)
    elif path.is_file():
        yield path.name, _read_bytes(path, source)
    elif path.exists():
        raise UserError(
            f"data.source={source!r}: neither a regular file nor a folder; give a text file or a folder of .txt files"
        )
    else:
        raise UserError(f"data.source={source!r}: no such file or folder; give a text file or a folder of .txt files")


def normalise_text(name: str, raw: bytes, policy: str) -> bytes:
    """UTF-8 without byte order mark, line ends \\n. Empty for a file that policy "skip" leaves out.

    Bytes that are not UTF-8, or NUL, which no text has, make the file "not text": policy "strict" raises UserError,
    "replace" puts U+FFFD in their place.
    """
    reason = _why_not_text(raw)
    if reason:
        if policy == "skip":
            return b""
        if policy == "strict":
            raise UserError(
                f"{name}: not UTF-8 text ({reason}); convert it to UTF-8, or set data.invalid_text=replace or data.invalid_text=skip"
            )
        raw = raw.decode("utf-8", errors="replace").replace("\0", "\ufffd").encode()
    return raw.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")


def _why_not_text(raw: bytes) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "it begins like UTF-16"
    nul = raw.find(0)
    if nul >= 0:
        return f"byte {nul} is NUL"
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"byte {error.start} is 0x{raw[error.start]:02x}"
    return ""


def _text_files(folder: Path, source: str) -> list[str]:
    """Relative POSIX paths of all .txt files below `folder`, sorted; links that lead out of it are ignored."""

    def refuse(error: OSError) -> None:
        raise UserError(
            f"data.source={source!r}: {error.filename} cannot be read ({error.strerror}); make it readable or move it away"
        )

    root = folder.resolve()
    names = []
    for parent, _, files in os.walk(folder, onerror=refuse):
        for path in (Path(parent, file) for file in files if file.endswith(".txt")):
            if path.is_file() and path.resolve().is_relative_to(root):
                names.append(path.relative_to(folder).as_posix())
    if not names:
        raise UserError(
            f"data.source={source!r}: no .txt file in this folder; put some there, or give a file with data.source=PATH"
        )
    return sorted(names)


def _read_bytes(path: Path, source: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"data.source={source!r}: {path} cannot be read ({error.strerror}); make it readable") from None

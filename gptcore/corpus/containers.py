"""Compressed files and archives, read as streams: member by member, nothing extracted, nothing trusted.

A file's name says what it is: a chain of compressions (`.gz .xz .bz2 .zst`), an archive (`.zip .tar`), a format. A
compressed file whose name ends there is looked into: OpenWebText's `.xz` files are tars. What an archive says about
its members (paths, links, sizes) is only ever compared with limits; the bytes that really come out are counted.
"""

from __future__ import annotations

import io
import lzma
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import BinaryIO, cast

from gptcore.config import DataConfig, UserError
from gptcore.config.data import FORMATS

COMPRESSIONS = {"gz": "gzip", "xz": "xz", "bz2": "bz2", "zst": "zstd"}
SHORT_NAMES = {"tgz": "tar.gz", "txz": "tar.xz", "tbz2": "tar.bz2", "tzst": "tar.zst"}
ALIASES = {"markdown": "md", "htm": "html", "xhtml": "html", "ndjson": "jsonl", "tsv": "csv"}
ARCHIVES = ("zip", "tar")
MAX_DEPTH = 3  # an archive in an archive in an archive
FREE_BYTES = 16 << 20  # any file may become this much: small texts of one repeated line compress a thousandfold
XZ_MEMORY = 512 << 20  # what an .xz file may ask for; xz -9 asks for 65 MiB
TAR_MAGIC = (257, b"ustar")
BLOCK = 1 << 20
Count = Callable[[str], None]  # is told of the rule by which a member is left out
Size = Callable[[], int]  # the compressed bytes that were read so far


class UndecodableError(Exception):
    """A file that is cut short, corrupt, or not what its name says. The message says which, not where."""


DECODING_ERRORS = (
    tarfile.TarError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    NotImplementedError,  # a zip with a compression this Python lacks
    RecursionError,  # tarfile, on long chains of extended headers
    OverflowError,
    ValueError,
)


@dataclass(frozen=True)
class Kind:
    """What a file's name says: outermost compression first, then an archive or a format ("" when it does not say)."""

    compressions: tuple[str, ...]
    inner: str
    extension: str  # the last one below the compressions, as written

    @classmethod
    def of(cls, name: str) -> Kind:
        lower = name[name.rfind("/") + 1 :].lower()
        extension = _extension(lower)
        if extension not in COMPRESSIONS and extension not in SHORT_NAMES:
            return _plain_kind(extension)
        if extension in SHORT_NAMES:
            lower = lower[: -len(extension)] + SHORT_NAMES[extension]
            extension = _extension(lower)
        compressions = []
        while extension in COMPRESSIONS:
            compressions.append(COMPRESSIONS[extension])
            lower = lower[: -len(extension) - 1]
            extension = _extension(lower)
        return cls(tuple(compressions), _plain_kind(extension).inner, extension)

    def is_wanted(self, formats: tuple[str, ...]) -> bool:
        """Is such a file of a folder or an archive read? Archives and bare compressed files are looked into."""
        if self.inner in ARCHIVES:
            return True
        if not self.extension:
            return bool(self.compressions)
        return (self.inner or self.extension) in formats or self.extension in formats


@lru_cache(maxsize=1024)
def _plain_kind(extension: str) -> Kind:
    inner = ALIASES.get(extension, extension)
    return Kind((), inner if inner in FORMATS + ARCHIVES else "", extension)


@dataclass
class Member:
    """One file to read: its name with the archive's before it, and its bytes."""

    name: str
    stream: BinaryIO
    format: str
    extension: str


class Counted(io.RawIOBase):
    """A decompressed stream that counts what comes out, and refuses what no text would become."""

    def __init__(self, inner: BinaryIO, bytes_in: Size, name: str, data: DataConfig) -> None:
        self.inner, self.bytes_in, self.name, self.data = inner, bytes_in, name, data
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        piece = self.inner.read(len(buffer))
        buffer[: len(piece)] = piece
        self.count += len(piece)
        check_expansion(self.count, self.bytes_in(), self.name, self.data)
        if self.count > self.data.max_member_bytes:
            raise UserError(
                f"{self.name}: more than data.max_member_bytes={self.data.max_member_bytes} uncompressed; "
                "leave it out, or raise the limit"
            )
        return len(piece)


def check_expansion(bytes_out: int, bytes_in: int, name: str, data: DataConfig) -> None:
    """Raises UserError for a file that becomes more than `data.max_expansion` times its size."""
    if bytes_out > max(FREE_BYTES, data.max_expansion * bytes_in):
        raise UserError(
            f"{name}: {bytes_in} bytes became {bytes_out}, more than data.max_expansion={data.max_expansion} times as "
            "many, as a decompression bomb does; leave the file out, or raise the limit"
        )


def open_members(name: str, raw: BinaryIO, data: DataConfig, count: Count) -> Iterator[Member]:
    """All readable files in one file on disk, in their order there; the file itself when it is no archive.

    `count(rule)` is told of members that are left out: "unsafe" (links, devices, paths that lead out), "unwanted".
    Raises UserError beyond a limit, UndecodableError for what cannot be decoded (also while a member's stream is read).
    """
    yield from _open(name, raw, Kind.of(name), data, count, raw.tell, depth=0)


def _open(name: str, raw: BinaryIO, kind: Kind, data: DataConfig, count: Count, size: Size, depth: int) -> Iterator[Member]:
    if depth > MAX_DEPTH:
        raise UserError(f"{name}: archives nested more than {MAX_DEPTH} deep; unpack the outer ones")
    if len(kind.compressions) > MAX_DEPTH:
        raise UserError(f"{name}: compressed more than {MAX_DEPTH} times; unpack it")
    stream = raw
    for compression in kind.compressions:
        counted = Counted(_decompressed(stream, compression), size, name, data)
        stream = cast(BinaryIO, io.BufferedReader(counted, BLOCK))
    inner = kind.inner
    if kind.compressions and not kind.extension and _is_tar(stream):
        inner = "tar"
    if inner == "tar":
        if not kind.compressions:
            stream = cast(BinaryIO, io.BufferedReader(Counted(stream, size, name, data), BLOCK))
        yield from _tar_members(name, stream, data, count, size, depth)
    elif inner == "zip":
        with seekable(name, stream, data) as file:
            yield from _zip_members(name, file, data, count, depth)
    else:
        yield Member(name, stream, inner or "txt", kind.extension)


class _Header(tarfile.TarInfo):
    """tarfile takes a broken header, or none where the file was cut, for the end of the archive; here it is damage."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Header:
        try:
            return cast(_Header, super().fromtarfile(archive))
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the end mark
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise UndecodableError("the tar ends without its end mark") from None
        except tarfile.HeaderError as error:
            raise UndecodableError(f"the tar has a broken header: {error}") from None


def walk_tar(stream: BinaryIO, mode: str) -> Iterator[tuple[tarfile.TarInfo, BinaryIO | None]]:
    """Every member of a tar in its order, with its bytes if it is a plain file whose path leads nowhere else, else None.

    `mode` is tarfile's. Raises one of DECODING_ERRORS, or UndecodableError. Limits are the caller's.
    """
    with tarfile.open(fileobj=stream, mode=mode, bufsize=BLOCK, tarinfo=_Header) as tar:  # type: ignore[call-overload]
        for member in tar:
            tar.members = []  # tarfile remembers every member: memory would grow
            is_plain = member.isreg() and not member.issparse() and _is_safe(member.name)
            yield member, tar.extractfile(member) if is_plain else None


def _tar_members(name: str, stream: BinaryIO, data: DataConfig, count: Count, size: Size, depth: int) -> Iterator[Member]:
    for number, (member, file) in enumerate(walk_tar(stream, "r|")):
        _check_count(name, number + 1, data)
        kind = Kind.of(member.name)
        if file is None:
            count("" if member.isdir() and _is_safe(member.name) else "unsafe")
        elif not kind.is_wanted(data.formats):
            count("unwanted")
        else:
            check_size(f"{name}/{member.name}", member.size, data)
            yield from _open(f"{name}/{member.name}", file, kind, data, count, size, depth + 1)


def _zip_members(name: str, file: BinaryIO, data: DataConfig, count: Count, depth: int) -> Iterator[Member]:
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        _check_count(name, len(infos), data)
        for info in infos:
            mode = info.external_attr >> 16
            if not _is_safe(info.filename) or (mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR)):
                count("unsafe")
                continue
            kind = Kind.of(info.filename)
            if info.is_dir() or not kind.is_wanted(data.formats):
                count("" if info.is_dir() else "unwanted")
                continue
            member = f"{name}/{info.filename}"
            if info.flag_bits & 1:
                raise UndecodableError(f"{info.filename} in it is encrypted")
            check_size(member, info.file_size, data)
            check_expansion(info.file_size, info.compress_size, member, data)
            with archive.open(info) as opened:
                counted = Counted(cast(BinaryIO, opened), lambda info=info: info.compress_size, member, data)  # type: ignore[misc]
                stream = cast(BinaryIO, io.BufferedReader(counted, BLOCK))
                yield from _open(member, stream, kind, data, count, lambda info=info: info.compress_size, depth + 1)  # type: ignore[misc]
                while stream.read(BLOCK):
                    pass  # to the end, where its checksum is compared


def _check_count(name: str, members: int, data: DataConfig) -> None:
    if members > data.max_members:
        raise UserError(f"{name}: more than data.max_members={data.max_members} files in it; split it up, or raise the limit")


def check_size(name: str, size: int, data: DataConfig) -> None:
    """Raises UserError for a file or archive member of more than `data.max_member_bytes`."""
    if size > data.max_member_bytes:
        raise UserError(
            f"{name}: {size} bytes, more than data.max_member_bytes={data.max_member_bytes}; leave it out, or raise the limit"
        )


def _is_safe(name: str) -> bool:
    """Paths that would lead out of a folder are never honest, though nothing is extracted here."""
    path = PurePosixPath(name.replace("\\", "/"))
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _extension(name: str) -> str:
    dot = name.rfind(".")
    return name[dot + 1 :] if dot > 0 and len(name) - dot <= 17 and " " not in name[dot:] else ""


def _is_tar(stream: BinaryIO) -> bool:
    offset, magic = TAR_MAGIC
    return cast(io.BufferedReader, stream).peek(512)[offset : offset + len(magic)] == magic


def _decompressed(stream: BinaryIO, compression: str) -> BinaryIO:
    if compression == "xz":
        return cast(BinaryIO, _Xz(stream))
    import pyarrow as pa

    return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), compression))


class _Xz:
    """lzma.LZMAFile with a memory limit, which a stream's header may otherwise set to 4 GiB."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self.decoder: lzma.LZMADecompressor | None = None
        self.pending = b""

    def read(self, size: int) -> bytes:
        while True:
            if self.decoder is None or self.decoder.eof:
                rest = (self.decoder.unused_data if self.decoder else b"").lstrip(b"\0")  # stream padding
                rest = rest or self.raw.read(BLOCK).lstrip(b"\0")
                if not rest:
                    return b""
                self.decoder = lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=XZ_MEMORY)
                piece = self.decoder.decompress(rest, size)
            elif self.decoder.needs_input:
                more = self.raw.read(BLOCK)
                if not more:
                    raise EOFError("compressed data ends before its end mark")
                piece = self.decoder.decompress(more, size)
            else:
                piece = self.decoder.decompress(b"", size)
            if piece:
                return piece


@contextmanager
def seekable(name: str, stream: BinaryIO, data: DataConfig) -> Iterator[BinaryIO]:
    """The stream itself if one can seek in it, else its copy in a nameless temporary file."""
    if stream.seekable():
        yield stream
        return
    with tempfile.TemporaryFile() as file:
        copied = 0
        while piece := stream.read(BLOCK):
            copied += len(piece)
            check_size(name, copied, data)
            file.write(piece)
        file.seek(0)
        yield cast(BinaryIO, file)

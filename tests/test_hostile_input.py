"""Hostile and broken input: every case ends in one sentence naming the file and the way out, and leaves nothing behind.

A case is a file (or folder) and what the message must say. With `data.invalid_text=skip` the same bad file beside a good
one is counted and left out, where the policy allows that; limits against bombs hold under every policy.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptcore.config import DataConfig, UserError
from gptcore.corpus import build_corpus, containers, read_documents
from gptcore.store import read_manifest, verified

RNG = random.Random(7)
WORDS = ["".join(RNG.choices("abcdefghij", k=RNG.randint(2, 8))) for _ in range(300)]


def prose(seed: int = 1, n_bytes: int = 8000) -> bytes:
    rng = random.Random(seed)
    text = ""
    while len(text) < n_bytes:
        text += " ".join(rng.choices(WORDS, k=rng.randint(5, 60))) + ".\n\n"
    return text.encode()


def zstd(raw: bytes) -> bytes:
    return pa.compress(raw, "zstd", asbytes=True)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": zstd}


def flipped(raw: bytes, place: float = 0.5) -> bytes:
    at = int(len(raw) * place)
    return raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :]


def make_tar(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "/etc/hostname") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def make_zip(*members: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def zip_link() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("link.txt")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def patched_zip(offset: int, value: int, width: str = "<H") -> bytes:
    """A zip whose local (at `offset`) and central (2 bytes later, as in the format) headers both say `value`."""
    raw = bytearray(make_zip(("a.txt", prose())))
    central = raw.index(b"PK\x01\x02")
    struct.pack_into(width, raw, offset, value)
    struct.pack_into(width, raw, central + offset + 2, value)
    return bytes(raw)


def make_parquet(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def lines(*values: Any) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def nested(depth: int) -> bytes:
    raw = make_tar(("a.txt", prose()))
    for level in range(depth):
        raw = make_tar((f"{level}.tar", raw))
    return raw


def xz_with_dictionary(exponent: int) -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 16}]
    raw = bytearray(lzma.compress(prose(), filters=filters, check=lzma.CHECK_NONE))
    raw[15] = exponent  # the LZMA2 filter's dictionary size in the block header; its CRC32 follows
    import zlib

    size = (raw[12] + 1) * 4
    struct.pack_into("<I", raw, 12 + size - 4, zlib.crc32(bytes(raw[12 : 12 + size - 4])))
    return bytes(raw)


# Damaged, or not text: an error under "strict", left out and counted under "skip".
BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "NUL": ("a.txt", b"text\0text", "byte 4 is NUL"),
    "PNG": ("a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "NUL"),
    "control characters": ("a.txt", bytes([1, 2, 3, 65]) * 50, "control characters"),
    "latin-1": ("a.txt", b"caf\xe9 au lait", "byte 3 is 0xe9"),
    "UTF-16 little-endian": ("a.txt", "text".encode("utf-16"), "UTF-16"),
    "UTF-16 big-endian": ("a.txt", b"\xfe\xff" + "text".encode("utf-16-be"), "UTF-16"),
    "UTF-32": ("a.txt", "text".encode("utf-32"), "UTF-16"),
    "UTF-8 cut inside a character": ("a.txt", "日本".encode()[:-1], "byte 3"),
    "overlong UTF-8": ("a.txt", b"abc\xc0\x80", "byte 3 is 0xc0"),
    "surrogate in UTF-8": ("a.txt", b"abc\xed\xa0\x80", "byte 3 is 0xed"),
    "beyond Unicode": ("a.txt", b"abc\xf4\x90\x80\x80", "byte 3 is 0xf4"),
    "bad text in gzip": ("a.txt.gz", gzip.compress(b"caf\xe9"), "0xe9"),
    "gzip that is none": ("a.txt.gz", prose(), "damaged"),
    "gzip with garbage behind": ("a.txt.gz", gzip.compress(prose()) + b"garbage!", "damaged"),
    "xz that asks for 3 GiB": ("a.txt.xz", xz_with_dictionary(39), "damaged"),
    **{f"{s} cut short": (f"a.txt.{s}", c(prose())[:-5], "damaged, cut short") for s, c in COMPRESS.items()},
    **{f"{s} cut in half": (f"a.txt.{s}", c(prose())[:900], "damaged, cut short") for s, c in COMPRESS.items()},
    **{f"{s} with a wrong byte": (f"a.txt.{s}", flipped(c(prose())), "damaged") for s, c in COMPRESS.items()},
    "zip that is none": ("a.zip", prose(), "damaged"),
    "zip cut short": ("a.zip", make_zip(("a.txt", prose()))[:-30], "damaged"),
    "zip with a wrong byte": ("a.zip", flipped(make_zip(("a.txt", prose())), 0.3), "damaged"),
    "zip, encrypted": ("a.zip", patched_zip(6, 1), "encrypted"),
    "zip, unknown method": ("a.zip", patched_zip(8, 77), "damaged"),
    "zip that lies about the size": ("a.zip", patched_zip(22, 100, "<I"), "damaged"),
    "tar that is none": ("a.tar", prose(), "damaged"),
    "tar cut inside a text": ("a.tar", make_tar(("a.txt", prose()))[:3000], "damaged"),
    "tar cut between texts": ("a.tar", make_tar(("a.txt", b"x" * 512), ("b.txt", b"y"))[:1024], "end mark"),
    "tar with a broken header": ("a.tar", flipped(make_tar(("a.txt", b"x"), ("b.txt", b"y")), 0.101), "damaged"),
    "tar.gz cut short": ("a.tar.gz", gzip.compress(make_tar(("a.txt", prose())))[:-9], "damaged"),
    "OpenWebText's xz cut short": ("a_data.xz", lzma.compress(make_tar(("a.txt", prose())))[:-40], "damaged"),
    "broken gzip in a tar": ("a.tar", make_tar(("a.txt.gz", gzip.compress(prose())[:-9])), "damaged"),
    "JSON lines that are none": ("a.jsonl", b'{"text": "a"}\nnot json\n', "byte 14 begins a line that is not JSON"),
    "JSON cut short": ("a.jsonl", lines({"text": "abc"})[:-4], "not JSON"),
    "JSON with a number for text": ("a.jsonl", lines({"text": 5}), "not a string"),
    "JSON with half a surrogate pair": ("a.jsonl", b'{"text": "\\ud800"}\n', "not JSON"),
    "JSON nested too deep": ("a.jsonl", b"[" * 100_000 + b"\n", "not JSON"),
    "CSV with a column too many": ("a.csv", b"id,text\n1,a\n2,b,c\n", "3 columns"),
    "CSV with NUL": ("a.csv", b"id,text\n1,a\0b\n", "NUL"),
    "CSV in latin-1": ("a.csv", b"id,text\n1,caf\xe9\n", "0xe9"),
    "Parquet that is none": ("a.parquet", prose(), "damaged"),
    "Parquet cut short": ("a.parquet", make_parquet(text=["a" * 900])[:-20], "damaged"),
    "Parquet with a wrong byte": ("a.parquet", flipped(make_parquet(text=[prose().decode()]), 0.3), "damaged"),
    "Parquet with bytes for text": ("a.parquet", make_parquet(text=[b"caf\xe9"]), "0xe9"),
    "HTML in latin-1": ("a.html", b"<p>caf\xe9", "0xe9"),
    "HTML nested without end": ("a.html", b"<div>" * 20_000, "nested more than"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused(tmp_path: Path, case: str) -> None:
    """Guards against a traceback, against text that is none, and against a corpus of half a source."""
    name, content, words = BAD_FILES[case]
    source = tmp_path / "in"
    source.mkdir()
    (source / "0.txt").write_bytes(prose(2))
    (source / name).write_bytes(content)
    message = refusal(source, tmp_path / "home")
    assert name in message
    assert words in message
    assert "data.invalid_text=skip" in message


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_skipped_and_counted_by_policy(tmp_path: Path, case: str) -> None:
    """Guards the policy: the good file beside it is there, whole, and the manifest says what is not."""
    name, content, _ = BAD_FILES[case]
    source = tmp_path / "in"
    source.mkdir()
    (source / "0.txt").write_bytes(prose(2))
    (source / name).write_bytes(content)
    corpus = build_corpus(DataConfig(source=str(source), invalid_text="skip"), tmp_path / "home")
    manifest = verified(corpus)
    assert manifest["rules"].get("invalid", 0) + manifest["rules"].get("damaged", 0) >= 1
    assert manifest["skipped"] >= 1
    whole = "".join(text for split in ("train", "val") for text in read_documents(corpus, split))
    assert len(whole.encode()) >= len(prose(2))
    assert "\0" not in whole


# Refused under every policy: limits, and mistakes in the settings.
LIMITED: dict[str, tuple[str, bytes, dict[str, Any], str]] = {
    **{f"{s} bomb": (f"a.txt.{s}", c(b"x" * 4_000_000), {}, "max_expansion") for s, c in COMPRESS.items()},
    "bomb in a bomb": ("a.txt.gz.gz", gzip.compress(gzip.compress(b"x" * 9_000_000)), {}, "max_expansion"),
    "zip bomb": ("a.zip", make_zip(("a.txt", b"x" * 4_000_000)), {}, "max_expansion"),
    "tar.xz bomb": ("a.tar.xz", lzma.compress(make_tar(("a.txt", b"x" * 4_000_000))), {}, "max_expansion"),
    "bomb in a tar": ("a.tar", make_tar(("a.txt.xz", lzma.compress(b"x" * 9_000_000))), {}, "max_expansion"),
    "Parquet bomb": ("a.parquet", make_parquet(text=["x" * 1000] * 9000), {}, "max_expansion"),
    "JSON lines bomb": ("a.jsonl.xz", lzma.compress(lines({"text": "x" * 1000}) * 4000), {}, "max_expansion"),
    "zip with too many files": ("a.zip", make_zip(*((f"{i}.txt", b"x") for i in range(9))), {"max_members": 8}, "max_members"),
    "tar with too many files": ("a.tar", make_tar(*((f"{i}.txt", b"x") for i in range(9))), {"max_members": 8}, "max_members"),
    "zip with a large file": ("a.zip", make_zip(("a.txt", prose())), {"max_member_bytes": 7000}, "max_member_bytes"),
    "tar with a large file": ("a.tar", make_tar(("a.txt", prose())), {"max_member_bytes": 7000}, "max_member_bytes"),
    "large file": ("a.txt", prose(), {"max_member_bytes": 7000}, "max_member_bytes"),
    "gzip of a large file": ("a.txt.gz", gzip.compress(prose()), {"max_member_bytes": 7000}, "max_member_bytes"),
    "too much in all": ("a.txt", prose(), {"max_total_bytes": 7000}, "max_total_bytes"),
    "archives in archives": ("a.tar", nested(5), {}, "nested more than 3"),
    "compressed five times": ("a.txt.gz.gz.gz.gz.gz", gzip.compress(prose()), {}, "compressed more than 3"),
    "JSON lines without the column": ("a.jsonl", lines({"body": "a"}), {}, "no column 'text', there are body"),
    "CSV without the column": ("a.csv", b"id,body\n1,a\n", {}, "no column 'text'"),
    "Parquet without the column": ("a.parquet", make_parquet(body=["a"]), {}, "no column 'text', there are body"),
    "Parquet with numbers": ("a.parquet", make_parquet(text=[1, 2]), {}, "holds int64, not text"),
}


@pytest.mark.parametrize("policy", ["strict", "skip"])
@pytest.mark.parametrize("case", LIMITED)
def test_limits_hold_under_every_policy(tmp_path: Path, case: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards disk and memory: what grows beyond a limit ends the run, it is not half read."""
    monkeypatch.setattr(containers, "FREE_BYTES", 1 << 20)
    name, content, settings, words = LIMITED[case]
    source = tmp_path / name
    source.write_bytes(content)
    message = refusal(source, tmp_path / "home", invalid_text=policy, **settings)
    assert words in message


# Members that are no plain file inside the archive: never read, counted, and the rest is.
UNSAFE: dict[str, tuple[str, bytes]] = {
    "tar: path upwards": ("a.tar", make_tar(("../../evil.txt", b"evil"), ("a.txt", prose()))),
    "tar: absolute path": ("a.tar", make_tar(("/etc/evil.txt", b"evil"), ("a.txt", prose()))),
    "tar: symbolic link": ("a.tar", make_tar(special("l.txt", tarfile.SYMTYPE), ("a.txt", prose()))),
    "tar: hard link": ("a.tar", make_tar(special("l.txt", tarfile.LNKTYPE), ("a.txt", prose()))),
    "tar: character device": ("a.tar", make_tar(special("d.txt", tarfile.CHRTYPE), ("a.txt", prose()))),
    "tar: block device": ("a.tar", make_tar(special("d.txt", tarfile.BLKTYPE), ("a.txt", prose()))),
    "tar: pipe": ("a.tar", make_tar(special("p.txt", tarfile.FIFOTYPE), ("a.txt", prose()))),
    "zip: path upwards": ("a.zip", make_zip(("../evil.txt", b"evil"), ("a.txt", prose()))),
    "zip: absolute path": ("a.zip", make_zip(("/etc/evil.txt", b"evil"), ("a.txt", prose()))),
    "zip: path upwards with backslashes": ("a.zip", make_zip(("..\\evil.txt", b"evil"), ("a.txt", prose()))),
    "zip: symbolic link": ("a.zip", make_zip((zip_link(), b"/etc/hostname"), ("a.txt", prose()))),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_unsafe_members_are_left_out_and_counted(tmp_path: Path, case: str) -> None:
    """Guards against reading what is outside the archive, and against writing anything anywhere."""
    name, content = UNSAFE[case]
    source = tmp_path / "in" / name
    source.parent.mkdir()
    source.write_bytes(content)
    corpus = build_corpus(DataConfig(source=str(source)), tmp_path / "home")
    assert read_manifest(corpus)["rules"] == {"unsafe": 1}
    whole = "".join(text for split in ("train", "val") for text in read_documents(corpus, split))
    assert sorted(whole) == sorted(prose().decode())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "in"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b""),
        ("a.txt", b"\xef\xbb\xbf"),
        ("a.txt.gz", gzip.compress(b"", mtime=0)),
        ("a.txt.zst", b""),
        ("a.jsonl", b""),
        ("a.jsonl", b"\n\n \n"),
        ("a.csv", b""),
        ("a.csv", b"id,text\n"),
        ("a.parquet", make_parquet(text=pa.array([], pa.string()))),
        ("a.parquet", make_parquet(text=pa.array([None], pa.string()))),
        ("a.zip", make_zip()),
        ("a.zip", make_zip(("a.exe", b"MZ"))),
        ("a.tar", make_tar()),
        ("a.tar", make_tar(special("l.txt", tarfile.SYMTYPE))),
        ("a.html", b"<html><head><title>t</title></head><script>x = 1</script></html>"),
    ],
)
def test_nothing_to_read_is_said(tmp_path: Path, name: str, content: bytes) -> None:
    """Guards against an empty corpus that only the trainer would complain about."""
    (tmp_path / name).write_bytes(content)
    assert "no text in it" in refusal(tmp_path / name, tmp_path / "home")


def test_paths_that_are_no_text(tmp_path: Path) -> None:
    """Guards against hanging on a pipe, endless devices, and links that lead elsewhere."""
    os.mkfifo(tmp_path / "pipe.txt")
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "gone.txt").symlink_to(tmp_path / "gone")
    (folder / "loop").symlink_to(folder)
    (folder / "out.txt").symlink_to("/etc/hostname")
    (folder / "self.txt").symlink_to(folder / "self.txt")
    home = tmp_path / "home"
    assert "neither a regular file nor a folder" in refusal(tmp_path / "pipe.txt", home)
    assert "neither a regular file nor a folder" in refusal("/dev/zero", home)
    assert "no file of data.formats" in refusal(folder, home)
    assert "no such file" in refusal(tmp_path / "missing.txt", home)
    assert "no file matches this glob" in refusal(tmp_path / "*.txtx", home)
    assert "only http://" in refusal("ftp://127.0.0.1/a.txt", home)
    assert "expected hf://" in refusal("hf://models/x", home)
    assert "expected http" in refusal("http:///a.txt", home)
    assert "data.source='http://[::1/x': expected http" in refusal("http://[::1/x?q", home)
    assert "expected http" in refusal("http://127.0.0.1/a.txt#md5=0", home)


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the message when permissions are missing (as root a file cannot be made unreadable, so os.open is told to refuse)."""
    source = tmp_path / "secret.txt"
    source.write_bytes(prose())
    real = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path) == str(source):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr("os.open", refuse)
    message = refusal(source, tmp_path / "home")
    assert "Permission denied" in message
    assert str(source) in message


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a half-written segment that a later run would take for a whole one."""
    source = tmp_path / "a.txt"
    source.write_bytes(prose(1, 60_000))

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device", "documents.parquet")

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", full)
    with pytest.raises(OSError, match="No space left"):
        build_corpus(DataConfig(source=str(source)), tmp_path / "home")
    assert leftovers(tmp_path / "home") == []
    monkeypatch.undo()
    assert verified(build_corpus(DataConfig(source=str(source)), tmp_path / "home"))


def test_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.txt"
    source.write_bytes(prose(1, 60_000))
    from gptcore.corpus import records

    real = records._read_entry

    def append(*args: Any) -> Any:
        yield from real(*args)
        with open(source, "ab") as file:
            file.write(b"more")

    monkeypatch.setattr(records, "_read_entry", append)
    assert "changed while it was read" in refusal(source, tmp_path / "home")


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "marker"])
def test_damaged_corpus_is_not_used(tmp_path: Path, damage: str) -> None:
    """Guards against training on a corpus that a disk error or a kill left damaged: it is refused, and made again."""
    source = tmp_path / "a.txt"
    source.write_bytes(prose(1, 60_000))
    home = tmp_path / "home"
    corpus = build_corpus(DataConfig(source=str(source)), home)
    (parquet,) = home.rglob("documents.parquet")
    content = parquet.read_bytes()
    if damage == "cut":
        parquet.write_bytes(content[:-1])
    elif damage == "flip":
        parquet.write_bytes(flipped(content))
    elif damage == "gone":
        parquet.unlink()
    else:
        (parquet.parent / "COMMITTED").unlink()
    if damage == "flip":  # of the same size
        with pytest.raises(UserError, match=r"documents\.parquet: content differs"):
            verified(parquet.parent)
    with pytest.raises(UserError, match=str(parquet.parent)):
        list(read_documents(corpus, "train"))
    assert build_corpus(DataConfig(source=str(source)), home) == corpus
    assert verified(parquet.parent)


def refusal(source: Path | str, home: Path, **settings: Any) -> str:
    """The message a source is refused with: one sentence, and nothing left of the attempt."""
    with pytest.raises(UserError) as caught:
        build_corpus(DataConfig(source=str(source), **settings), home)
    message = str(caught.value)
    assert "\n" not in message
    assert leftovers(home) == []
    return message


def leftovers(home: Path) -> list[Path]:
    return [path for kind in ("segments", "corpora") for path in (home / "data" / kind).glob("*")]

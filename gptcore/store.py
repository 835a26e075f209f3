"""Files that are whole or absent: content ids and directories committed in two phases.

Everything gptloom keeps on disk (corpora, vocabularies, shards, checkpoints) is a directory written under a temporary
name, flushed, given a manifest of sizes and hashes, renamed, and marked last. A reader that finds no marker finds
nothing, so a kill at any moment leaves either the old state or the new one. What a kill leaves half-written is swept by
`leftovers.sweep` at the next start; a writer holds a lock on its temporary directory, so that nobody sweeps under its hands.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptcore.config import UserError
from gptcore.leftovers import hold, sweep
from gptcore.locks import is_held, read_holder, sign_lock, take_lock

MARKER = "COMMITTED"
MANIFEST = "manifest.json"
LOCK = ".lock"


class DamagedError(UserError):
    """A committed directory is not what its manifest says: torn, changed, or a file is missing."""


class ClaimedError(UserError):
    """Another process is at work in a directory."""


def home_dir() -> Path:
    """Where all state lives: $GPTLOOM_HOME, by default ./.gptloom; absolute."""
    return Path(os.environ.get("GPTLOOM_HOME") or ".gptloom").expanduser().resolve()


def keep_private() -> None:
    """What this process and its children write is for the user, and for the group as far as the user's umask says; others see nothing."""
    os.umask(os.umask(0o077) | 0o007)


def content_id(value: Any) -> str:
    """16 hex digits that stand for a JSON value: equal values, equal ids, on any machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def hash_file(path: Path) -> str:
    """sha256 of a file, read in pieces, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_committed(directory: Path) -> bool:
    return (directory / MARKER).is_file()


@contextmanager
def commit_dir(directory: Path, manifest: dict[str, Any]) -> Iterator[Path]:
    """Write a directory in two phases: `with commit_dir(final, manifest) as tmp: … write into tmp …`.

    The manifest may be filled inside the block; the sizes and sha256 of all files are added to it as `files`. An exception
    inside the block removes the temporary directory. If another process committed the same id meanwhile, its copy
    stays and ours is dropped: the contents are equal by definition of the id.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    sweep(directory.parent)
    tmp = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.tmp")
    tmp.mkdir()
    lock = hold(tmp)
    try:
        yield tmp
        manifest["files"] = {
            str(path.relative_to(tmp)): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
            for path in sorted(tmp.rglob("*"))
            if path.is_file()
        }
        write_json(tmp / MANIFEST, manifest)
        for path in tmp.rglob("*"):
            _fsync(path)
        _fsync(tmp)
        if directory.exists() and not is_committed(directory):
            shutil.rmtree(directory)
        try:
            tmp.rename(directory)
        except OSError:
            if not is_committed(directory):
                raise
        else:
            _fsync(directory.parent)
            (directory / MARKER).touch()
            _fsync(directory / MARKER)
            _fsync(directory)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        os.close(lock)


@contextmanager
def claim(directory: Path, patience_s: float = 5.0) -> Iterator[None]:
    """Be the only process that writes below `directory` while the block lasts.

    A holder that was just killed is waited for. Raises ClaimedError, a UserError, naming the process that holds it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{directory}: a file is in the way; give a directory") from None
    path = directory / LOCK
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if not take_lock(lock, patience_s):
            holder = read_holder(path) or "unknown"
            raise ClaimedError(f"{directory}: process {holder} is at work there; wait for its end, or stop it first")
        sign_lock(lock)
        yield
    finally:
        os.close(lock)


def is_claimed(directory: Path) -> bool:
    """Whether a living process has claimed `directory`."""
    return is_held(directory / LOCK)


def read_manifest(directory: Path, *, verify: bool = False) -> dict[str, Any]:
    """The manifest of a committed directory, sizes checked; with `verify` the hashes too.

    Raises DamagedError, a UserError, naming the file that is missing or changed.
    """
    if not directory.is_dir():
        raise DamagedError(f"{directory}: no such directory; correct the path, or run again to make it")
    if not is_committed(directory):  # whatever it is: someone's run, or what a killed process left
        raise DamagedError(
            f"{directory}: not a committed directory (no {MARKER} in it); correct the path, or, if that is a checkpoint, corpus, "
            "vocabulary or shard set that was cut short, delete it and run again to remake it"
        )
    remake = f"delete {directory} and run again to remake it"
    try:
        manifest = read_json(directory / MANIFEST)
        files = {str(name): (int(facts["bytes"]), str(facts["sha256"])) for name, facts in manifest["files"].items()}
    except (UserError, ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(f"{directory / MANIFEST}: missing or damaged; {remake}") from None
    for name, (size, sha256) in files.items():
        path = inside(directory, name)
        if not path.is_file() or path.stat().st_size != size:
            raise DamagedError(f"{path}: missing or of another size than its manifest says; {remake}")
        if verify and hash_file(path) != sha256:
            raise DamagedError(f"{path}: content differs from its manifest (sha256); {remake}")
    return manifest


def inside(directory: Path, name: str) -> Path:
    """`directory/name` for a name that a file states. Raises DamagedError for one that leads out, by `..`, a root or a link."""
    path = directory / name
    if "\0" in name or not path.resolve().is_relative_to(directory.resolve()):
        raise DamagedError(f"{directory}: names a file outside of itself, {name[:80]!r}; it is damaged or was tampered with")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError when it is missing, or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged, it holds no JSON object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Readable JSON through a temporary name, so that a reader never sees half of it."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tmp.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    tmp.replace(path)


def link_or_copy(file: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

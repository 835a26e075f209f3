"""Files that are whole or absent, and believed only when they are what was written: content ids, committed directories, state.

Everything gptloom keeps on disk (corpora, vocabularies, shards, checkpoints) is a directory written under a temporary
name, flushed, given a manifest of sizes and hashes, renamed, and marked last. A reader that finds no marker finds
nothing, so a kill at any moment leaves either the old state or the new one. What a kill leaves half-written is swept by
`leftovers.sweep` at the next start; a writer holds a lock on its temporary directory, so that nobody sweeps under its hands.

The marker holds the manifest's sha256, the manifest those of all files. Whoever reads bytes that decide a number has compared them
in this process: `verified` reads a directory's files once, in order, and remembers for as long as the process lives; `read_manifest`
is for who wants facts of the manifest alone. Files without a manifest carry a checksum inside (`write_json`, `write_arrays`). What was
written before there were checksums is still read.

Damage is what the bytes say: a file that is missing, of another size, of other content. A file that the machine does not let us read
(rights, a failing disk, too many open files) may be whole: that stays an OSError, upon which nobody renames, deletes or makes again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.config import UserError
from gptcore.leftovers import hold, sweep
from gptcore.locks import is_held, read_holder, sign_lock, take_lock

if TYPE_CHECKING:
    import numpy as np

MARKER = "COMMITTED"
MANIFEST = "manifest.json"
LOCK = ".lock"
CHECKSUM = "checksum"  # the key of a file's own sha256 …
SEAL = "sha256:"  # … and how its value begins
HASHERS = 2  # threads that hash the files of a directory: more would wait for the disk or for memory
PIECE_BYTES = 1 << 20
PUT_BACK = "put a copy of it back, or delete it to begin anew"
THREADED_BYTES = 16 << 20  # less is hashed before a second thread has begun

# What the system answers where there is no such file; with any other number it refused to look, or to read.
NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}

# The sha256 of files that this process has read, by device, inode, size and times of change: the name may change, the bytes may not.
_known: dict[tuple[int, ...], str] = {}


class DamagedError(UserError):
    """A committed directory is not what its manifest says: torn, changed, or a file is missing."""


class ClaimedError(UserError):
    """Another process is at work in a directory."""


def home_dir() -> Path:
    """Where all state lives: $GPTLOOM_HOME, by default ./.gptloom; absolute."""
    return Path(os.environ.get("GPTLOOM_HOME") or ".gptloom").expanduser().resolve()


def make_home() -> Path:
    """GPTLOOM_HOME, made if need be: then for its owner alone, whatever the umask. Raises UserError when it cannot be made."""
    home = home_dir()
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        try:
            home.mkdir(mode=0o700)
        except FileExistsError:
            if not home.is_dir():
                raise
        else:
            home.chmod(0o700)
    except OSError as error:
        raise UserError(
            f"GPTLOOM_HOME={home}: cannot be made ({error.strerror}); point GPTLOOM_HOME at a folder you can write to"
        ) from None
    return home


def keep_private() -> None:
    """What this process and its children write is for the user, and for the group as far as the user's umask says; others see nothing."""
    os.umask(os.umask(0o077) | 0o007)


def content_id(value: Any) -> str:
    """16 hex digits that stand for a JSON value: equal values, equal ids, on any machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def hash_file(path: Path) -> str:
    """sha256 of a file, read in pieces, as 64 hex digits. Raises OSError, with its name."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(PIECE_BYTES))
    try:
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(piece):
                digest.update(piece[:size])
    except OSError as error:
        raise_refused(error, path)
        raise
    return digest.hexdigest()


def raise_refused(error: OSError, path: Path) -> None:
    """Raise `error` anew, with the file's name, where the machine refused to read: that says nothing about the bytes.

    Comes back where there is no such file, or where a library says in its own words, without a number, that it is damaged.
    """
    if error.errno is not None and error.errno not in NO_FILE:
        # What read() raises has no name, and whoever is told wants one.
        raise OSError(error.errno, error.strerror, str(path)) from None


def _is_id(name: str) -> bool:
    """Could `content_id` have made it? A copy may be called anything else."""
    return re.fullmatch("[0-9a-f]{16}", name) is not None


def is_committed(directory: Path) -> bool:
    """Raises OSError where the machine does not let us look."""
    return _size_of(directory / MARKER) is not None


def _size_of(path: Path) -> int | None:
    """Bytes of a file, None where there is none. Raises OSError where the machine does not let us look."""
    try:
        facts = path.stat()
    except OSError as error:
        raise_refused(error, path)
        return None
    except ValueError:  # a null byte, or half a surrogate pair: no file is called so
        return None
    return facts.st_size if stat.S_ISREG(facts.st_mode) else None


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
            str(path.relative_to(tmp)): {"bytes": path.stat().st_size, "sha256": _known_hash(path)}
            for path in sorted(tmp.rglob("*"))
            if path.is_file()
        }
        write_json(tmp / MANIFEST, manifest, has_checksum=False)
        marker = hash_file(tmp / MANIFEST) + "\n"
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
            _replace_text(directory / MARKER, marker)
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


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a committed directory, compared with its marker, and its files with the sizes it states. Their bytes are not
    read: for that there is `verified`.

    Raises DamagedError, a UserError, naming the file that is missing or changed; OSError where one cannot be read.
    """
    if not directory.is_dir():
        raise DamagedError(f"{directory}: no such directory; correct the path, or run again to make it")
    if not is_committed(directory):  # whatever it is: someone's run, or what a killed process left
        raise DamagedError(
            f"{directory}: not a committed directory (no {MARKER} in it); correct the path, or, if that is a checkpoint, corpus, "
            "vocabulary or shard set that was cut short, delete it and run again to remake it"
        )
    path = directory / MANIFEST
    try:
        stated, raw = _read(directory / MARKER), _read(path)
        manifest = _parse(raw)
        files = {str(name): (int(facts["bytes"]), str(facts["sha256"])) for name, facts in manifest["files"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise DamagedError(f"{path}: missing or damaged; {_remake(directory)}") from None
    # An earlier version's marker is empty.
    if stated and stated != f"{hashlib.sha256(raw).hexdigest()}\n".encode():
        raise DamagedError(f"{path}: not what {MARKER} beside it says (sha256); {_remake(directory)}")
    # Whole, and yet not what was asked for: two directories that were exchanged vouch for themselves.
    if manifest.get("id", directory.name) != directory.name and _is_id(directory.name):
        raise DamagedError(
            f"{directory}: holds {str(manifest['id'])[:80]}, as its {MANIFEST} says; give it that name back, or {_remake(directory)}"
        )
    for name, (size, _) in files.items():
        path = inside(directory, name)
        if _size_of(path) != size:
            raise DamagedError(f"{path}: missing or of another size than its manifest says; {_remake(directory)}")
    return manifest


def verified(directory: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The manifest of a committed directory whose files are, byte by byte, what it says: all of them, or those `names`.

    A file is read once in a process, in pieces, and again only when it has changed since. Raises DamagedError, a UserError, naming
    the first file that is missing or changed; OSError where one cannot be read.
    """
    manifest = read_manifest(directory)
    files = manifest["files"]
    chosen = list(files if names is None else names)
    if unknown := [name for name in chosen if name not in files]:
        raise DamagedError(f"{directory / MANIFEST}: does not list {unknown[0]}; {_remake(directory)}")
    paths = [directory / name for name in chosen]
    try:
        if len(paths) > 1 and sum(files[name]["bytes"] for name in chosen) > THREADED_BYTES:
            with ThreadPoolExecutor(HASHERS) as pool:  # hashing lets go of the interpreter's lock
                found = list(pool.map(_known_hash, paths))
        else:
            found = [_known_hash(path) for path in paths]
    except FileNotFoundError as error:  # since a moment ago
        raise DamagedError(f"{error.filename}: missing; {_remake(directory)}") from None
    for name, path, sha256 in zip(chosen, paths, found, strict=True):
        if sha256 != files[name]["sha256"]:
            raise DamagedError(f"{path}: content differs from its manifest (sha256); {_remake(directory)}")
    return manifest


def verify_file(path: Path) -> None:
    """Compare one file of a committed directory with the manifest beside it; a file that is in none is taken as it is.

    Raises DamagedError as `verified` does.
    """
    if is_committed(path.parent) and path.name in read_manifest(path.parent)["files"]:
        verified(path.parent, [path.name])


def _known_hash(path: Path) -> str:
    """`hash_file`, once in this process as long as the file stays as it is."""
    facts = path.stat()
    key = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)  # nobody can set the last one back
    if key not in _known:
        _known[key] = hash_file(path)
    return _known[key]


def _read(path: Path) -> bytes:
    """A file's bytes. Raises FileNotFoundError where there is no file, another OSError, with its name, where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise_refused(error, path)
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from None


def _remake(directory: Path) -> str:
    return f"delete {directory} and run again to remake it"


def inside(directory: Path, name: str) -> Path:
    """`directory/name` for a name that a file states. Raises DamagedError for one that leads out, by `..`, a root or a link."""
    path = directory / name
    try:
        is_inside = path.resolve().is_relative_to(directory.resolve())
    except ValueError:  # a null byte, or half a surrogate pair
        is_inside = False
    if not is_inside:
        raise DamagedError(f"{directory}: names a file outside of itself, {name[:80]!r}; it is damaged or was tampered with")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, without its checksum; one that a person or an earlier version wrote has none.

    Raises UserError when it is missing, DamagedError when it holds anything else or is not what was written, OSError when it cannot be
    read.
    """
    try:
        raw = _read(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        value = _parse(raw)
    except ValueError:
        raise DamagedError(f"{path}: damaged, it holds no JSON object; {PUT_BACK}") from None
    # A checksum under another name is one whose name was damaged.
    seals = {key for key, text in value.items() if key == CHECKSUM or (isinstance(text, str) and text.startswith(SEAL))}
    if seals and (seals != {CHECKSUM} or value.pop(CHECKSUM) != _seal(value)):
        raise DamagedError(f"{path}: damaged, its content is not what was written (checksum); {PUT_BACK}")
    return value


def write_json(path: Path, value: Any, *, has_checksum: bool = True) -> None:
    """Readable JSON through a temporary name, so that a reader never sees half of it; an object gets a checksum, for `read_json`.

    has_checksum: not for what other programs read, or a manifest covers.
    """
    if has_checksum and isinstance(value, dict):
        value = {**value, CHECKSUM: _seal(json.loads(json.dumps(value)))}
    _replace_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote. Raises DamagedError for a file that is missing, or whose content is another; OSError where it cannot be
    read.
    """
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        stated = arrays.pop(CHECKSUM, None)  # an earlier version wrote none
        is_whole = stated is None or stated.tobytes() == _digest(arrays)
    except Exception as error:  # zipfile, zlib, tokenize and NumPy have many words for damage
        if isinstance(error, OSError):
            raise_refused(error, path)
        raise DamagedError(f"{path}: damaged ({type(error).__name__}: {error}); {PUT_BACK}") from None
    if not is_whole:
        raise DamagedError(f"{path}: damaged, its content is not what was written (checksum); {PUT_BACK}")
    return arrays


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Arrays by name as .npz with a checksum, through a temporary name; no pickled objects."""
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.stem}.{os.getpid()}.tmp.npz")
    whole: dict[str, Any] = {**arrays, CHECKSUM: np.frombuffer(_digest(arrays), dtype=np.uint8)}
    np.savez(tmp, **whole)
    tmp.replace(path)


def _digest(arrays: Mapping[str, np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape} ".encode())
        digest.update(arrays[name].tobytes())
    return digest.digest()


def _parse(raw: bytes) -> dict[str, Any]:
    """Raises ValueError for anything but a JSON object."""
    try:
        value = json.loads(raw.decode())
    except RecursionError:
        value = None
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def _seal(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return SEAL + hashlib.sha256(text.encode()).hexdigest()


def _replace_text(path: Path, text: str) -> None:
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tmp.write_text(text, encoding="utf-8")
    tmp.replace(path)


def write_once(path: Path, content: bytes) -> bool:
    """Write a file whole or not at all, with mode 0600; False when there is one already, which stays as it is."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # mkstemp's mode is 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(name, path)  # unlike a rename this fails where there is one
    except FileExistsError:
        return False
    finally:
        os.unlink(name)
    return True


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

"""File locks (flock): the kernel keeps them with the open file and frees them when the last process that has it ends, however it ends.

So a lock is held exactly as long as its descriptor is open, here or in a child that was forked with it; closing another descriptor
of the same file loses nothing, and a rename takes it along.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOOK_S = 0.05


def try_lock(fd: int, *, is_shared: bool = False) -> bool:
    """Take the lock of an open file; False while another has it. Raises OSError where the file system has no locks."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def take_lock(fd: int, patience_s: float | None = None) -> bool:
    """Wait for the lock of an open file, so many seconds (None: for ever); False when they are over. Raises OSError as try_lock."""
    if patience_s is None:
        fcntl.flock(fd, fcntl.LOCK_EX)
        return True
    deadline = time.monotonic() + patience_s
    while not try_lock(fd):
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_S)
    return True


@contextmanager
def held_beside(path: Path, patience_s: float) -> Iterator[None]:
    """Hold a lock file beside `path` while the block lasts: whoever makes it is waited for, so many seconds. For two starts at once."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            take_lock(fd, patience_s)
        yield
    finally:
        os.close(fd)


def is_held(path: Path) -> bool:
    """Does a living process hold this file's lock? True also where a file system has no locks: then nobody can tell."""
    try:
        with open(path, "rb") as file:
            return not try_lock(file.fileno(), is_shared=True)
    except (FileNotFoundError, NotADirectoryError):  # where no file can be, nobody holds one
        return False
    except OSError:
        return True


def sign_lock(fd: int) -> None:
    """Write our process id into a lock file that we hold."""
    os.truncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)


def read_holder(path: Path) -> int | None:
    """The process that holds a lock file and has signed it; None while nobody does, and for the instant before it signs."""
    try:
        with open(path, encoding="utf-8") as file:
            return None if try_lock(file.fileno(), is_shared=True) else int(file.read() or 0) or None
    except (FileNotFoundError, NotADirectoryError):
        return None


def find_holder(path: Path) -> int | None:
    """The process that holds a file's lock, from /proc/locks (Linux); None where that does not say."""
    inode = path.stat().st_ino
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode) and int(words[4]) > 0:
                return int(words[4])
    return None

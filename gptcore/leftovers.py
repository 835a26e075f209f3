"""Directories under a temporary name: held while they are filled, swept once their maker is gone.

A builder that is killed leaves `.NAME.tmp` behind, as large as what it built. The lock on the directory tells it from a
living one's: the kernel frees it when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from pathlib import Path

from gptcore.locks import try_lock

log = logging.getLogger(__name__)

NEW_S = 60.0  # between making and holding a directory lies an instant
FILE_S = 86_400.0  # files have no lock: a download of a day ago is nobody's


def hold(directory: Path) -> int:
    """Keep `sweep` away from a directory, until the descriptor is closed; the lock follows a rename."""
    fd = os.open(directory, os.O_RDONLY)
    with contextlib.suppress(OSError):  # a network file system may have no locks on directories; `sweep` then leaves it
        try_lock(fd)
    return fd


def find_leftovers(folder: Path, new_s: float = NEW_S) -> list[Path]:
    """`.*.tmp` entries directly in `folder` that nobody holds: what killed processes left."""
    return [path for path in sorted(folder.glob(".*.tmp")) if _is_left(path, new_s)]


def sweep(folder: Path, new_s: float = NEW_S) -> list[Path]:
    """Delete the leftovers of a folder; returns them.

    new_s: seconds a directory is left alone after its making; 0 where nobody else makes any.
    """
    gone = find_leftovers(folder, new_s)
    for path in gone:
        log.info("removing %s, left by a process that was killed", path)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return gone


def _is_left(path: Path, new_s: float) -> bool:
    try:
        if path.is_symlink():
            return False
        age = time.time() - path.stat().st_mtime
        if not path.is_dir():
            return age > FILE_S
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return try_lock(fd) and age >= new_s
    except OSError:  # locks are not to be had: nobody knows
        return False
    finally:
        os.close(fd)

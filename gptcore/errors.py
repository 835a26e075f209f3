"""What goes wrong: the kinds that a caller tells apart, the exit code of each, and its one sentence for people."""

from __future__ import annotations

import errno
import os
from pathlib import Path

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USER = 2  # the user's mistake
EXIT_STOPPED = 75  # stopped on request, checkpoint kept
EXIT_NON_FINITE = 76  # loss or gradient was not a number
EXIT_MEMORY = 77  # out of device memory at the smallest micro-batch


class UserError(ValueError):
    """A mistake only the user can mend. The message names the field or file, the value and the way out; exit code 2."""


class Stopped(Exception):
    """SIGTERM or SIGINT was obeyed. The message names the checkpoint to go on from, or says why there is none of this step."""


class NonFinite(Exception):
    """The loss or a gradient became inf or nan; raised before the optimizer step."""


class DeviceMemoryError(Exception):
    """The device's memory does not hold even one sequence."""


NAMELESS = (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE)  # these come without a file, from a read or a socket
READABLE = "make it readable for you (every folder above it too)"
WRITABLE = "make it writable for you, or point GPTLOOM_HOME at a folder that is"
FILES = "allow more with `ulimit -n 4096`, or close other programs"
SURROUNDINGS = {  # what the machine refuses, and what its user can do about it
    errno.EACCES: WRITABLE,
    errno.EPERM: WRITABLE,
    errno.EROFS: WRITABLE,
    errno.EMFILE: FILES,
    errno.ENFILE: FILES,
    errno.ESTALE: "the file system was mounted anew, or its server restarted: mount it again and repeat this",
    errno.EIO: "the disk may be failing: copy what matters, then `gptloom doctor --full`",
}


def is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_of_surroundings(error: BaseException) -> bool:
    """Did the machine refuse a file, and not our own code fail?"""
    if not isinstance(error, OSError):
        return False
    return is_disk_full(error) or error.errno in (SURROUNDINGS if error.filename is not None else NAMELESS)


def exit_code(error: BaseException) -> int:
    if isinstance(error, UserError) or is_of_surroundings(error):
        return EXIT_USER
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        return EXIT_STOPPED
    if isinstance(error, NonFinite):
        return EXIT_NON_FINITE
    if isinstance(error, (DeviceMemoryError, MemoryError)):
        return EXIT_MEMORY
    return EXIT_BUG


def error_of(code: int) -> type[Exception]:
    """The kind of error that an exit code stands for, where a process or a record has kept the code alone."""
    kinds = {EXIT_USER: UserError, EXIT_NON_FINITE: NonFinite, EXIT_MEMORY: DeviceMemoryError}
    return kinds.get(code, RuntimeError)


def describe_error(error: BaseException) -> str:
    if is_disk_full(error):
        name = getattr(error, "filename", None)
        where = f" while writing {name}" if name else ""
        return f"no space left on the disk{where}; free some, or point GPTLOOM_HOME at another disk"
    if isinstance(error, OSError) and is_of_surroundings(error):
        number = error.errno or 0
        is_closed = number in (errno.EACCES, errno.EPERM) and _is_closed(error.filename)
        what = f"{error.filename}: " if error.filename is not None else ""
        return f"{what}{(error.strerror or os.strerror(number)).lower()}; {READABLE if is_closed else SURROUNDINGS[number]}"
    if isinstance(error, (UserError, Stopped, NonFinite, DeviceMemoryError)):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _is_closed(name: str | bytes | int) -> bool:
    """Can a file not even be read, or not be reached? The error does not say what it was opened for."""
    if isinstance(name, int):  # an open file
        return False
    path = Path(os.fsdecode(name))
    if os.path.lexists(path):
        return not os.access(path, os.R_OK)
    # Below a closed folder nothing seems to exist; into an open one something was to be written.
    return not os.access(next((above for above in path.parents if os.path.lexists(above)), path), os.X_OK)


def first_line(error: BaseException) -> str:
    """What a library says, short: the first line of its message, or its kind where it has none."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition(" (Caused by")[0][:1000]  # urllib3 nests its reasons; the outermost says enough


def why_unreadable(error: OSError | UnicodeDecodeError) -> str:
    """The reason why a text file could not be read."""
    return error.strerror or str(error) if isinstance(error, OSError) else "not UTF-8 text"

"""Training shards that are read while they are still being verified.

Hashing takes a second a gigabyte, and a training need not wait for it: a thread goes through the files in order, the loop looks at
every step whether one was bad, and waits for the end before it saves. So nothing learnt from damaged shards gets into a checkpoint.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gptcore.errors import Stopped
from gptcore.store import DamagedError, verified

# Of the half minute between Prefect's SIGTERM and its SIGKILL, in seconds: for the rest of the files, and for the one being read.
STOP_S, CLOSE_S, LOOK_S = 10.0, 5.0, 0.2


class Verification:
    """Files of committed directories, as (directory, name), verified by a thread in their order."""

    def __init__(self, files: Sequence[tuple[Path, str]] = ()) -> None:
        self.since = 0  # steps done before the first that may have read them
        self._files = files
        self._error: BaseException | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="verification", daemon=True) if files else None
        if self._thread is not None:
            self._thread.start()

    def check(self) -> None:
        """Raises DamagedError once a file was found that is not what its manifest says; waits for nothing."""
        if isinstance(self._error, DamagedError):
            raise DamagedError(
                f"{self._error}. It was read from step {self.since + 1} on; no checkpoint holds anything of that"
            )
        if self._error is not None:
            raise self._error

    def settle(self, is_stopping: Callable[[], object] = lambda: False) -> bool:
        """Wait until all is verified, but STOP_S at most once the run is being stopped; was all verified? Raises what `check` does."""
        deadline = None
        while self._thread is not None and self._thread.is_alive():
            if deadline is None and is_stopping():
                deadline = time.monotonic() + STOP_S
            if deadline is not None and time.monotonic() > deadline:
                return False
            self._thread.join(LOOK_S)
        self.check()
        return True

    def close(self) -> None:
        """Leave no thread behind that will begin another file; what it has not come to stays unverified."""
        self._is_closing = True
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """What fails inside for damaged text fails by that name."""
        try:
            yield
        except Stopped:
            raise
        except Exception as error:
            # An id that is none of the vocabulary's stops a step before the thread has come to it.
            try:
                self.settle()
            except DamagedError as damage:
                raise damage from error
            raise

    def _work(self) -> None:
        try:
            for directory, name in self._files:
                if self._is_closing:
                    return
                verified(directory, [name])
        except BaseException as error:
            self._error = error

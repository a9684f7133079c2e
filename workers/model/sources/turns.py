"""One process of a node downloads, the others wait and see how far it is. The kernel gives the turn on when a process dies.

Imports nothing of Manta but what progress is.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from workers.model.sources.progress import Progress

WAIT_S = 0.5
TELL_S = 1.0


@contextlib.contextmanager
def turn(file: Path, report: Progress) -> Iterator[Progress]:
    """Waits until nobody else is within, threads of this process included. report: told meanwhile how far the other one is.
    Yields what the own work shall be reported to. Errors: OSError."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o664)
    try:
        while not _taken(descriptor):
            _read(descriptor, report)
            time.sleep(WAIT_S)
        told_s = 0.0

        def tell(done: int, total: int) -> None:
            nonlocal told_s
            report(done, total)
            if time.monotonic() - told_s >= TELL_S:
                told_s = time.monotonic()
                os.pwrite(descriptor, f"{done:20d} {total:20d}".encode(), 0)

        tell(0, 0)
        yield tell
    finally:
        os.close(descriptor)  # and the lock with it


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(descriptor: int, report: Progress) -> None:
    with contextlib.suppress(ValueError):  # nothing stands there yet
        done, total = map(int, os.pread(descriptor, 41, 0).split())
        report(done, total)

"""Processes that a test stops or ends by their own ids, seeing that none is left behind: what `benchmarks/shared/processes.py`
tells of them, and waiting for what must come."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from benchmarks.shared.processes import (
    ENGINE,
    INGRESS,
    SCHEDULER,
    WORKER,
    alive,
    command_line,
    descendants,
    kept_stopped,
    named,
    signal_all,
    wait_gone,
)

__all__ = [
    "ENGINE", "INGRESS", "SCHEDULER", "WORKER", "alive", "all_named", "command_line", "descendants", "kept_stopped", "named",
    "running_by", "signal_all", "stopped_in_the_midst", "wait_gone",
]  # fmt: skip

T = TypeVar("T")


def running_by(folder: Path) -> list[int]:
    """Processes of this machine whose command lines name files of the folder."""
    everybody = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in everybody if f"{folder}/" in command_line(pid)]


def all_named(name: str, count: int, of: int | None = None, patience_s: float = 180.0) -> list[int]:
    """All of them, once there are so many: a process that is about to change its title has none for a moment.
    Errors: AssertionError."""
    deadline = time.monotonic() + patience_s
    while len(found := named(name, of)) != count:
        assert time.monotonic() < deadline, f"{count} processes should be called {name}: {found}"
        time.sleep(0.05)
    return found


@contextlib.contextmanager
def stopped_in_the_midst(processes: Iterable[int], begin: Callable[[], T], runs: Callable[[T], bool]) -> Iterator[T]:
    """What `begin` has begun, while `processes` are stopped (SIGSTOP) so that it does not end; begins anew if it had ended
    before they were. runs: whether all of it still runs, asked once they are stopped.

    A test of what happens in mid-request would else depend on how fast this machine happens to be. Errors: AssertionError.
    """
    held = [*processes]
    try:
        for _ in range(20):
            begun = begin()
            signal_all(held, signal.SIGSTOP)
            if runs(begun):
                yield begun
                return
            signal_all(held, signal.SIGCONT)
        raise AssertionError("it always ends before it can be stopped: make it longer")
    finally:
        signal_all(held, signal.SIGCONT)

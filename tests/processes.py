"""Which processes descend from one, by /proc: to stop or end a worker by its own id, and to see that none is left behind."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

WORKER, SCHEDULER = "ray::WorkerActor", "ray::SchedulerActor"
INGRESS, ENGINE = "ray::ServeReplica:manta:Ingress", "ray::ServeReplica:manta:Engine"
"""What Ray calls the processes of a group's ranks, of the scheduler, of a front end, of the engine."""


def descendants(ancestor: int) -> dict[int, str]:
    """{process id: command line} of everything below `ancestor`."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            fields = stat.rpartition(")")[2].split()
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    found: dict[int, str] = {}
    frontier = {ancestor}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier and child not in found}
        found.update({child: command_line(child) for child in frontier})
    return found


def command_line(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def running_by(folder: Path) -> list[int]:
    """Processes of this machine whose command lines name files of the folder."""
    everybody = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in everybody if f"{folder}/" in command_line(pid)]


def named(name: str, of: int | None = None) -> list[int]:
    """Processes of this name of the Ray cluster that this process (or `of`) has started."""
    return sorted(pid for pid, line in descendants(of or os.getpid()).items() if line.startswith(name))


def all_named(name: str, count: int, of: int | None = None, patience_s: float = 180.0) -> list[int]:
    """All of them, once there are so many: a process that is about to change its title has none for a moment.
    Errors: AssertionError."""
    deadline = time.monotonic() + patience_s
    while len(found := named(name, of)) != count:
        assert time.monotonic() < deadline, f"{count} processes should be called {name}: {found}"
        time.sleep(0.05)
    return found


def alive(processes: Iterable[int]) -> set[int]:
    """Those of `processes` that still run; a zombie does not."""
    left = set()
    for process in processes:
        try:
            stat = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            continue
        if stat.rpartition(")")[2].split()[0] != "Z":
            left.add(process)
    return left


def wait_gone(processes: Iterable[int], patience_s: float = 60.0) -> set[int]:
    """Waits until they are gone; returns those that are not."""
    deadline = time.monotonic() + patience_s
    left = alive(processes)
    while left and time.monotonic() < deadline:
        time.sleep(0.2)
        left = alive(left)
    return left


def signal_all(processes: Iterable[int], number: signal.Signals) -> None:
    """Those that have ended are left alone."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


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

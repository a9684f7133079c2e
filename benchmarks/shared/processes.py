"""Processes of this machine, by /proc (Linux only): what one has started, what they are called, what they hold, signals to
them by their ids. Imports the standard library only; tests use it too (`tests/shared/processes.py`).
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

WORKER, SCHEDULER = "ray::WorkerActor", "ray::SchedulerActor"
ENGINE, INGRESS = "ray::ServeReplica:manta:Engine", "ray::ServeReplica:manta:Ingress"
"""What Ray calls the processes of a group's ranks, of the scheduler, of who owns both, of a front end."""

AGAIN_S = 0.02


@dataclass(frozen=True, slots=True)
class Process:
    """What one process holds at one moment."""

    name: str
    rss_bytes: int
    threads: int
    descriptors: int


def descendants(ancestor: int) -> dict[int, str]:
    """{process id: command line} of everything below `ancestor`, and of what it has left behind in its session, if it leads
    one: orphans have another parent. Those that have ended (zombies) do not count."""
    parents: dict[int, int] = {}
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields and fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
                if int(fields[3]) == ancestor != int(entry.name):
                    found[int(entry.name)] = command_line(int(entry.name))
    frontier = {ancestor, *found}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier and child not in found}
        found.update({child: command_line(child) for child in frontier})
    return found


def command_line(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def named(name: str, of: int | None = None) -> list[int]:
    """Processes whose command lines begin so, of those that this process (or `of`) has started."""
    return sorted(pid for pid, line in descendants(of or os.getpid()).items() if line.startswith(name))


def alive(processes: Iterable[int]) -> set[int]:
    """Those of `processes` that still run, or are stopped; a zombie does not."""
    return {process for process in processes if (fields := _stat(process)) and fields[0] != "Z"}


def cpu_s(process: int) -> float:
    """Seconds of CPUs that it has had. Errors: ProcessLookupError if it has ended."""
    if not (fields := _stat(process)):
        raise ProcessLookupError(f"process {process} has ended")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def births(processes: Iterable[int]) -> dict[int, str]:
    """When each of those that run or are stopped began. Another may have its number later, and never that moment."""
    found = {process: _stat(process) for process in processes}
    return {process: fields[19] for process, fields in found.items() if fields and fields[0] != "Z"}


def still_there(born: Mapping[int, str]) -> list[int]:
    """Those of `births` that have not ended since."""
    return [process for process, moment in births(born).items() if moment == born[process]]


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
def kept_stopped(processes: Iterable[int]) -> Iterator[None]:
    """Stopped, and stopped again as soon as anybody wakes them. Errors: ProcessLookupError for one that has ended before."""
    with contextlib.ExitStack() as stack:
        handles = [os.pidfd_open(process) for process in processes]
        for handle in handles:
            stack.callback(os.close, handle)
        over = threading.Event()

        def insist() -> None:
            while True:
                for handle in handles:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(handle, signal.SIGSTOP)
                if over.wait(AGAIN_S):
                    return

        insisting = threading.Thread(target=insist, daemon=True)
        insisting.start()
        try:
            yield
        finally:
            over.set()
            insisting.join()


def held_by(processes: Iterable[int]) -> dict[int, Process]:
    """What each of them holds; without those that have ended meanwhile."""
    found = {}
    for process in processes:
        with contextlib.suppress(OSError, KeyError):  # a process that is ending has no more memory
            found[process] = _read(Path(f"/proc/{process}"))
    return found


def _read(folder: Path) -> Process:
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
    command = command_line(int(folder.name)).split()
    name = " ".join(Path(word).name for word in command[:3]) if command else status["Name"].strip()
    descriptors = len(list((folder / "fd").iterdir()))
    return Process(name[:40], int(status["VmRSS"].split()[0]) << 10, int(status["Threads"]), descriptors)


def _stat(process: int) -> list[str]:
    """State, parent, process group, session, ...; nothing if there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []

"""Which processes descend from one, by /proc: to end a worker by its own id, and to see that none is left behind."""

import os
import time
from collections.abc import Iterable
from pathlib import Path


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


def workers(of: int | None = None) -> dict[int, str]:
    """The rank processes of the Ray cluster that this process (or `of`) has started."""
    return {pid: line for pid, line in descendants(of or os.getpid()).items() if "ray::WorkerActor" in line}


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

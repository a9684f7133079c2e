"""The faults: what is done to processes, by whoever may trace them (their owner; no other rights are needed). Linux only.

Not among them, since it takes root: delaying or dropping packets on their way (`tc`), and bounds on a disk's rate (cgroups).
`slow` stops a process nine tenths of the time instead, so all that it says is late; `disk` keeps the node's disk busy.
"""

import argparse
import contextlib
import ctypes
import os
import random
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos.roles import ROLES
from benchmarks.shared.processes import alive, kept_stopped, signal_all

KINDS = {
    "kill": "SIGKILL",
    "stop": "SIGSTOP for good: again whenever it is woken",
    "pause": "SIGSTOP, and SIGCONT after 1 to 12 s",
    "cut": "every TCP connection that it has is shut down",
    "slow": "stopped nine tenths of the time, for 8 s",
    "disk": "files are written and synced without a pause, for 8 s (of the node)",
}
NODE = "node"
LASTING = ("gcs", "raylet")
"""Roles whose death ends the Ray cluster, and so the endpoint."""

WOKEN = ("haproxy",)
"""Roles that are stopped once: woken, they go on, and one that is stopped again each time still answers, so nobody ends it."""

PAUSES_S = (1.0, 12.0)
SLOW_S, SLICE_S = 8.0, 0.2
INSIST_S = 120.0
DISK_BYTES = 32 << 20
PIDFD_GETFD = 438
"""The system call's number, the same on every architecture."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind and a role. Errors: ValueError for one that does not exist."""

    kind: str
    role: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind} is no kind of fault: choose from {', '.join(KINDS)}")
        if self.role not in ((NODE,) if self.kind == "disk" else ROLES):
            known = NODE if self.kind == "disk" else ", ".join(ROLES)
            raise ValueError(f"{self.kind} cannot be done to {self.role}: choose from {known}")

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """`kind:role`."""
        kind, _, role = text.partition(":")
        return cls(kind, role)

    @property
    def replaces(self) -> bool:
        """Whether others must come for the processes that it is done to."""
        return self.kind == "kill" or (self.kind == "stop" and self.role not in WOKEN)

    @property
    def ends_all(self) -> bool:
        return self.replaces and self.role in LASTING

    def __str__(self) -> str:
        return f"{self.kind}:{self.role}"


def faults_of(text: str) -> list[Fault]:
    """`kind:role,...`, for argparse."""
    try:
        return [Fault.parse(each.strip()) for each in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def inflict(fault: Fault, victims: Iterable[int], draw: random.Random) -> None:
    """Returns when it has been done; what passes by itself has passed then."""
    victims = list(victims)
    match fault.kind:
        case "kill":
            signal_all(victims, signal.SIGKILL)
        case "stop":
            signal_all(victims, signal.SIGSTOP)
            if fault.role not in WOKEN:
                threading.Thread(target=_insist, args=(victims,), daemon=True).start()
        case "pause":
            with _stopped(victims):
                time.sleep(draw.uniform(*PAUSES_S))
        case "slow":
            until_s = time.monotonic() + SLOW_S
            while time.monotonic() < until_s:
                with _stopped(victims):
                    time.sleep(0.9 * SLICE_S)
                time.sleep(0.1 * SLICE_S)
        case "cut":
            for victim in victims:
                cut(victim)
        case "disk":
            _busy_disk(SLOW_S)


def _insist(victims: list[int]) -> None:
    """That they stay stopped, until whoever looks after them has ended them."""
    until_s = time.monotonic() + INSIST_S
    with contextlib.suppress(ProcessLookupError), kept_stopped(victims):
        while time.monotonic() < until_s and alive(victims):  # a busy host takes several attempts
            time.sleep(1.0)


def cut(pid: int) -> int:
    """Shuts down the TCP connections of another process, for both sides; how many they were. What listens is left alone.
    Errors: OSError if this process may not trace that one."""
    libc, count = ctypes.CDLL(None, use_errno=True), 0
    handle = os.pidfd_open(pid)
    try:
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if not os.readlink(f"/proc/{pid}/fd/{entry}").startswith("socket:"):
                    continue
                count += _shut_down(libc.syscall(PIDFD_GETFD, handle, int(entry), 0))
    finally:
        os.close(handle)
    return count


def _shut_down(descriptor: int) -> bool:
    """Errors: OSError for one that was not to be had."""
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    with socket.socket(fileno=descriptor) as connection:
        if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
            return False
        connection.getpeername()  # OSError for one that listens
        connection.shutdown(socket.SHUT_RDWR)
        return True


@contextlib.contextmanager
def _stopped(victims: list[int]) -> Iterator[None]:
    signal_all(victims, signal.SIGSTOP)
    try:
        yield
    finally:
        signal_all(victims, signal.SIGCONT)


def _busy_disk(seconds: float) -> None:
    """Two writers, on the disk of the temporary folder."""
    until_s = time.monotonic() + seconds

    def write(path: Path) -> None:
        with path.open("wb", buffering=0) as file:
            while time.monotonic() < until_s:
                file.seek(0)
                file.write(os.urandom(1 << 20) * (DISK_BYTES >> 20))
                os.fsync(file.fileno())

    with tempfile.TemporaryDirectory(prefix="manta-disk-") as folder:
        writers = [threading.Thread(target=write, args=(Path(folder) / str(number),)) for number in range(2)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()


def resume(victims: Iterable[int]) -> None:
    """Whoever is still stopped goes on: nobody may stay so."""
    signal_all(alive(victims), signal.SIGCONT)

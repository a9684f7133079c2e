"""Which host a process runs on, as far as sharing memory goes, and how memory is named there. No torch."""

import os
import socket
from pathlib import Path

import msgspec


class SharedMemory(msgspec.Struct, frozen=True, array_like=True):
    """A stretch of a device's memory, as torch names it to other processes of the host (`workers.mapping`). size: bytes."""

    handle: bytes
    size: int
    offset: int
    counter: bytes
    counter_at: int
    event: bytes
    waits: bool


def host_identity() -> str:
    """Equal for two processes exactly if they can share memory: one running kernel, one set of process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"

"""Which host a process runs on, as far as sharing memory goes. Standard library only."""

import os
import socket
from pathlib import Path


def host_identity() -> str:
    """Equal for two processes exactly if they can share memory: one running kernel, one set of process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"

"""Ports for servers that another process starts later."""

import contextlib
import random
import socket

FIRST, END = 20_000, 30_000
"""Above the ports of Ray's workers, below those of Serve's replicas and of connections: nobody takes one meanwhile."""


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Ports of `host`, each another, on which nobody listens now."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in random.SystemRandom().sample(range(FIRST, END), END - FIRST):
            if len(found) == count:
                break
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_server((host, port)))
                found.append(port)
    assert len(found) == count, "hardly a port is free"
    return found

"""Requests under way when an endpoint is told to end: a short while, said in a line, then an error that says why.

Knows the service, and neither Ray nor a server.
"""

import asyncio
import threading
import time
from collections.abc import Callable

from deploy.frontend.service.service import Service
from scheduler.server.stats import ClusterStatus

GRACE_S = 3.0
POLL_S = 0.1
LATE_S = 1.5
"""For the cluster to say what is under way; then it is waited for all the same, and said so."""

UNKNOWN = -1
"""Requests under way where nobody can say how many."""

Say = Callable[[str], None]


def let_end(status: Callable[[], ClusterStatus], say: Say) -> None:
    """Returns when the cluster has no request under way. Whoever calls it waits `GRACE_S` at most."""
    untold = threading.Lock()  # taken by whoever says it: once

    def tell(count: int) -> None:
        if untold.acquire(blocking=False):
            say(_waiting(count, "sequence(s)") if count else "ending; no request is under way")

    late = threading.Timer(LATE_S, tell, (UNKNOWN,))
    late.daemon = True
    late.start()
    try:
        while count := _under_way(status):
            tell(count)
            time.sleep(POLL_S)
        tell(0)
    finally:
        late.cancel()


def end_late(service: Service, say: Say) -> None:
    """From the service's event loop: what of its requests is still under way after a while ends with an error."""
    if service.under_way:
        say(_waiting(service.under_way, "request(s)"))
        asyncio.get_running_loop().call_later(GRACE_S, service.end_all)


def _waiting(count: int, what: str) -> str:
    requests = f"{count} {what}" if count > 0 else "requests"
    return f"ending; waiting for {requests} under way, {GRACE_S:g} s at most: Ctrl-C again ends them at once"


def _under_way(status: Callable[[], ClusterStatus]) -> int:
    """Sequences: each choice of a request is one. Or UNKNOWN."""
    try:
        engine = status().engine
    except Exception:  # Serve raises what the engine raised, and errors of its own
        return UNKNOWN
    return engine.waiting + sum(group.running + group.fetching for group in engine.groups) if engine is not None else UNKNOWN

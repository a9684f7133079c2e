"""Requests under way when an endpoint is told to end: a short while, said in a line, then an error that says why.

Knows the service, and neither Ray nor a server.
"""

import asyncio
import time
from collections.abc import Callable

from deploy.frontend.service import Service
from scheduler.server.stats import ClusterStatus

GRACE_S = 3.0
POLL_S = 0.1

Say = Callable[[str], None]


def let_end(status: Callable[[], ClusterStatus], say: Say) -> None:
    """Returns when the cluster has no request under way. Whoever calls it waits `GRACE_S` at most."""
    told = False
    while count := _under_way(status):
        if not told:
            told = True
            say(_waiting(count))
        time.sleep(POLL_S)


def end_late(service: Service, say: Say) -> None:
    """From the service's event loop: what of its requests is still under way after a while ends with an error."""
    if service.under_way:
        say(_waiting(service.under_way))
        asyncio.get_running_loop().call_later(GRACE_S, service.end_all)


def _waiting(count: int) -> str:
    requests = f"{count} request(s)" if count > 0 else "requests"
    return f"ending; waiting for {requests} under way, {GRACE_S:g} s at most: Ctrl-C again ends them at once"


def _under_way(status: Callable[[], ClusterStatus]) -> int:
    """-1: nobody knows."""
    try:
        engine = status().engine
    except Exception:  # Serve raises what the engine raised, and errors of its own
        return -1
    return engine.waiting + sum(group.running + group.fetching for group in engine.groups) if engine is not None else -1

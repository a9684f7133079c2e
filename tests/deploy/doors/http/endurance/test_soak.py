"""Hundreds of requests at once, many given up by their clients: afterwards nothing of them is left.
`benchmarks/serving/soak.py` is the long run, with Ray's processes and their memory."""

import asyncio
import random
import threading
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from benchmarks.serving.soak import asks
from benchmarks.shared.load import Outcome, run
from cluster.config import EngineConfig
from deploy.config.load import EMBEDDED_MODEL
from deploy.frontend.clusters import LocalCluster
from tests.deploy.doors.http.conftest import KV_MEMORY_BYTES, Host, until

REQUESTS = 150
UNDER_WAY = 32


def soak(address: str, seed: int, requests: int) -> list[Outcome]:
    where = urlsplit(address)
    plan = {
        "host": where.hostname, "port": where.port, "path": "/v1/completions", "limit": UNDER_WAY,
        "requests": [asdict(ask) for ask in asks(random.Random(seed), requests)],
    }  # fmt: skip
    return asyncio.run(run(plan))


@pytest.mark.slow
def test_nothing_is_left_of_requests_that_ended_or_were_given_up() -> None:
    host = Host()
    try:
        cluster = LocalCluster(EngineConfig(model=str(EMBEDDED_MODEL), local=True, kv_memory=KV_MEMORY_BYTES, threads=1))
        service = host.service(cluster)
        address = host.serve(service)

        def held() -> int:
            stats = host.run(cluster.status()).engine
            assert stats is not None
            assert all(g.free_blocks + g.held_blocks + g.cached_blocks == g.total_blocks for g in stats.groups)
            return sum(group.held_blocks + group.running for group in stats.groups) + stats.waiting

        async def tasks() -> int:
            return len(asyncio.all_tasks())

        def open_handles() -> tuple[int, int, int]:
            return host.run(tasks()), threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

        soak(address, 0, UNDER_WAY)  # opens what stays open
        until(lambda: not service.under_way and not held())
        before = open_handles()
        outcomes = soak(address, 1, REQUESTS)
        assert all(outcome.complete or outcome.left for outcome in outcomes)
        assert sum(outcome.left for outcome in outcomes) > REQUESTS // 6
        assert sum(outcome.complete for outcome in outcomes) > REQUESTS // 2
        until(lambda: not service.under_way and not held())
        until(lambda: all(now <= then for now, then in zip(open_handles(), before, strict=True)))
    finally:
        host.close()

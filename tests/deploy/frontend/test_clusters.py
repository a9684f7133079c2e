"""Whom a front end asks how its cluster is."""

import asyncio
from typing import Any

import pytest

from deploy.frontend.clusters import ServeCluster
from scheduler.server.stats import ClusterStatus


class Remote:
    """An actor's or a deployment's method."""

    def __init__(self, answer: ClusterStatus | None) -> None:
        self._answer = answer

    async def remote(self, *_: Any) -> ClusterStatus | None:
        return self._answer


class Actor:
    def __init__(self, answer: ClusterStatus | None) -> None:
        self.status = Remote(answer)


def status_of(engine: ClusterStatus | None, scheduler: Actor | None, monkeypatch: pytest.MonkeyPatch) -> ClusterStatus:
    cluster = ServeCluster(Actor(engine), "manta", "1")
    monkeypatch.setattr(cluster, "_scheduler", lambda: scheduler)
    return asyncio.run(cluster.status())


def test_an_engine_that_serves_another_version_leaves_the_word_to_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = ClusterStatus(phase="ready")
    assert status_of(ready, None, monkeypatch) == ready
    assert status_of(None, Actor(ready), monkeypatch) == ready
    nobody = status_of(None, None, monkeypatch)
    assert (nobody.phase, nobody.progress) == ("starting", ("the engine does not answer: the engine does not serve version 1",))

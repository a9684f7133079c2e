"""Whom a front end asks how its cluster is."""

import asyncio
from typing import Any

import pytest

from deploy.frontend import clusters
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


def test_nobody_is_asked_on_whose_answer_has_not_come_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Front ends ask once a second, and the engine may be stopped for as long as it takes to replace it."""

    class Silent(Remote):
        async def remote(self, *_: Any) -> ClusterStatus | None:
            await asyncio.Event().wait()
            return None

    actor = Actor(None)
    actor.status = Silent(None)
    monkeypatch.setattr(clusters, "ENGINE_PATIENCE_S", 0.01)
    monkeypatch.setattr(clusters, "STATUS_TIMEOUT_S", 0.05)
    cluster = ServeCluster(actor, "manta", "1")
    monkeypatch.setattr(cluster, "_scheduler", lambda: actor)

    async def scenario() -> None:
        assert (await cluster.status()).phase == "starting"
        await asyncio.sleep(0.1)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())

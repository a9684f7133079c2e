"""How a front end treats the store that all of them share, without Ray: `test_responses_ray.py` is the same over a cluster."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import ray

from deploy.doors.openai.responses.store import shared
from deploy.doors.openai.responses.store.shared import SharedResponses
from deploy.doors.openai.responses.store.storing import Bounds, KeptResponses, StoredTurn
from deploy.frontend.errors import Fault, RequestError
from scheduler.protocol.orphans import Estate

BOUNDS = Bounds(100, 1 << 20, 3600.0)
TURN = StoredTurn(b"[1]", b"[2]")
PATIENCE_S = 120.0


class Method:
    def __init__(self, answer: Callable[..., Any]) -> None:
        self._answer = answer

    async def remote(self, *told: Any) -> Any:
        return await self._answer(*told)


class Actor:
    """A handle of one that lives, is silent, or has died."""

    def __init__(self) -> None:
        self.kept = KeptResponses()
        self.words = 0
        self.asked = 0
        self.silent = False
        self.dead = False
        self.keep = Method(self._keep)
        self.put = Method(self._put)
        self.body = Method(self._body)

    async def _keep(self) -> None:
        await self._there()
        self.words += 1

    async def _put(self, *told: Any) -> bool:
        await self._there()
        return self.kept.put(*told)

    async def _body(self, *told: Any) -> bytes | None:
        await self._there()
        return self.kept.body(*told)

    async def _there(self) -> None:
        self.asked += 1
        if self.dead:
            raise ray.exceptions.ActorDiedError
        if self.silent:
            await asyncio.Event().wait()


class Front(SharedResponses):
    """Finds the last of these actors."""

    def __init__(self, actors: list[Actor], timeout_s: float = 600.0) -> None:
        super().__init__(Estate("space", "version", timeout_s), BOUNDS, "text")
        self._actors = actors

    def _find(self) -> Actor:
        return self._actors[-1]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_front_end_says_that_it_lives_until_it_is_closed() -> None:
    async def live() -> None:
        actor = Actor()
        front = Front([actor], timeout_s=0.06)
        assert await front.put("ann", "r", None, b"{}", TURN)
        await until(lambda: actor.words > 3)
        actor.dead = True  # a word that fails does not end them
        asked = actor.asked
        await until(lambda: actor.asked > asked + 2)
        actor.dead = False
        words = actor.words
        await until(lambda: actor.words > words)
        await front.close()
        words = actor.words
        await asyncio.sleep(0.1)
        assert actor.words == words

    asyncio.run(live())


def test_one_that_has_died_is_found_anew() -> None:
    async def lose() -> None:
        actors = [Actor()]
        front = Front(actors)
        assert await front.put("ann", "r", None, b"{}", TURN)
        actors[0].dead = True
        actors.append(Actor())
        assert await front.put("ann", "s", None, b"{}", TURN)
        assert (await front.body("ann", "r"), await front.body("ann", "s")) == (None, b"{}")
        actors[-1].dead = True
        assert not await front.put("ann", "t", None, b"{}", TURN), "there is no other yet"
        await front.close()

    asyncio.run(lose())


def test_one_that_is_silent_keeps_nobody_waiting_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "ANSWER_S", 0.05)

    async def wait() -> None:
        actor = Actor()
        front = Front([actor])
        assert await front.put("ann", "r", None, b"{}", TURN)
        actor.silent = True
        assert not await front.put("ann", "s", None, b"{}", TURN)
        asked = actor.asked
        with pytest.raises(RequestError) as caught:
            await front.body("ann", "r")
        assert (caught.value.fault, caught.value.retry_after_s) == (Fault.UNAVAILABLE, shared.QUIET_S)
        assert actor.asked == asked, "it was not even asked"
        actor.silent = False
        monkeypatch.setattr(shared, "QUIET_S", 0.0)
        front._silent_until_s = 0.0
        assert await front.body("ann", "r") == b"{}"
        await front.close()

    asyncio.run(wait())

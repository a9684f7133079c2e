"""A store of responses that all front ends of an application share: one detached actor, found by its name. Imports ray.

It does not belong to a version of the model: conversations go on while one takes over from another. Whichever front end needs
it first starts it, and the next one that needs it starts it anew, empty, if it has died.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.fleet.ownership.remains import actor_of
from deploy.doors.openai.responses.store.actor import ResponsesActor
from deploy.doors.openai.responses.store.storing import Bounds, StoredTurn
from deploy.frontend.errors import Fault, RequestError
from scheduler.protocol.orphans import Estate

logger = logging.getLogger(__name__)

NAME = "responses"
ANSWER_S = 5.0
START_S = 60.0
QUIET_S = 15.0
"""For so long nobody is kept waiting for a store that has just not answered."""

KEEPS = 6
"""Words of each front end, in the time after which an actor without any ends."""


class SharedResponses:
    """A `ResponseStore` of this process. estate: of it the namespace counts, and how long the actor outlives all front ends."""

    def __init__(self, estate: Estate, bounds: Bounds, log_format: str) -> None:
        self._estate = estate
        self._bounds = bounds
        self._log_format = log_format
        self._actor: Any | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._silent_until_s = 0.0

    async def put(self, owner: str, name: str, previous: str | None, body: bytes, turn: StoredTurn) -> bool:
        if not self._bounds.count:
            return False
        try:
            return bool(await self._asked(lambda actor: actor.put.remote(owner, name, previous, body, turn, self._bounds)))
        except RequestError as error:
            logger.warning("the response %s is not kept: %s", name, error.message)
            return False

    async def body(self, owner: str, name: str) -> bytes | None:
        found: bytes | None = await self._asked(lambda actor: actor.body.remote(owner, name))
        return found

    async def turns(self, owner: str, name: str) -> list[StoredTurn] | None:
        found: list[StoredTurn] | None = await self._asked(lambda actor: actor.turns.remote(owner, name))
        return found

    async def delete(self, owner: str, name: str) -> bool:
        return bool(await self._asked(lambda actor: actor.delete.remote(owner, name)))

    async def close(self) -> None:
        """This process keeps the store alive no more."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    async def _asked(self, ask: Callable[[Any], Awaitable[Any]]) -> Any:
        """Errors: RequestError UNAVAILABLE."""
        if time.monotonic() < self._silent_until_s:
            raise self._silent("has just not answered")
        try:
            for _ in range(2):
                try:
                    actor = await self._reached()
                    async with asyncio.timeout(ANSWER_S):
                        return await ask(actor)
                except ray.exceptions.ActorDiedError:
                    self._actor = None
            raise self._silent("has died twice")
        except (ray.exceptions.RayError, TimeoutError) as error:
            self._silent_until_s = time.monotonic() + QUIET_S
            raise self._silent(f"does not answer: {str(error) or type(error).__name__}") from error

    def _silent(self, how: str) -> RequestError:
        return RequestError(Fault.UNAVAILABLE, f"the store of responses {how}", retry_after_s=QUIET_S)

    async def _reached(self) -> Any:
        """The actor, which is there. Errors: Ray's, TimeoutError."""
        async with self._starting:
            if self._actor is None:
                actor = await asyncio.to_thread(self._find)
                async with asyncio.timeout(START_S):
                    await actor.keep.remote()
                self._actor = actor
            if self._keeping is None:
                self._keeping = asyncio.create_task(self._keep())
            return self._actor

    async def _keep(self) -> None:
        """Says to the actor that there is a front end. That it has died, whoever asks it next finds out."""
        while True:
            await asyncio.sleep(self._estate.adoption_timeout_s / KEEPS)
            if self._actor is not None:
                with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                    async with asyncio.timeout(ANSWER_S):
                        await self._actor.keep.remote()

    def _find(self) -> Any:
        """Beside this process, if it has to be started: on any other node Ray would put it where its node may go."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = ray.remote(ResponsesActor).options(
            name=NAME, namespace=self._estate.namespace, lifetime="detached", get_if_exists=True, num_cpus=0, max_restarts=0,
            max_task_retries=0, scheduling_strategy=here,
        )  # fmt: skip
        return options.remote(self._estate.adoption_timeout_s, self._log_format)


def end_responses(namespace: str) -> None:
    """The application has ended."""
    with contextlib.suppress(ValueError):  # there is none
        ray.kill(actor_of(namespace, NAME), no_restart=True)

"""The models beside the first, as a front end on Ray Serve finds them: each an application `ENDPOINT:...` with an Engine alone.

    Serve: which there are ─▶ their Engines: what they serve ─▶ a service for each ─▶ `FurtherModels`, where doors look

So a model is added by deploying an application and removed by deleting it, and nothing else is started anew. Imports ray.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.fleet.estate import estate_of, namespace_of
from cluster.fleet.rolling import serves_another_version
from cluster.fleet.shelf import AdapterShelf
from deploy.config.serve import FURTHER, ServeConfig, for_model
from deploy.frontend.clusters import ServeCluster
from deploy.frontend.models.adapters import ServedAdapters
from deploy.frontend.models.further import FurtherModel, FurtherModels, ModelState
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from deploy.observing.observer import Observer
from deploy.serving.replicas.engine import ServedVersion, further_applications, further_name
from scheduler.protocol.orphans import Estate

logger = logging.getLogger(__name__)

LOOK_S = 1.0
ASK_TIMEOUT_S = 2.0
BEGIN_S = 20.0
"""That a new front end waits for what the models' Engines say, before it takes requests without one of them."""

RETRY_S = 30.0
"""After which a model that could not be opened is tried again as it is."""

TURN_POLL_S = 0.5
LINGER_S = 2.0
"""That a service which no newcomer finds any more waits for those who have found it, and whose prompts are being read."""


async def turn_of(cluster: ServeCluster, estate: Estate) -> None:
    """Waits until groups of this version are up, while front ends of another one serve."""
    while not await cluster.groups_are_up() and await asyncio.to_thread(serves_another_version, estate):
        await asyncio.sleep(TURN_POLL_S)


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """A further model that this front end serves, with the adapters beside it. tasks: what runs for it, the last one first at
    its end."""

    told: ServedVersion
    engine: DeploymentHandle
    model: FurtherModel
    adapters: ServedAdapters
    observer: Observer
    tasks: tuple["asyncio.Task[None]", ...]

    async def close(self) -> None:
        """To its end, also where its caller is cancelled meanwhile."""
        await _to_the_end(self._close())

    async def _close(self) -> None:
        for task in reversed(self.tasks):  # the observer first: what it has goes out through the service
            task.cancel()
            await asyncio.wait((task,))
        await asyncio.to_thread(self.observer.close)


class Discovery:
    """Keeps `further` as Serve says that it should be. limits: the endpoint's. first: the name of its first model."""

    def __init__(self, endpoint: str, first: str, limits: ServeConfig, further: FurtherModels) -> None:
        self._endpoint = endpoint
        self._first = first
        self._limits = limits
        self._further = further
        self._there: dict[str, str | None] = {}  # by application, as all that follows: why Serve has given it up
        self._engines: dict[str, DeploymentHandle] = {}
        self._opened: dict[str, Opened] = {}
        self._opening: dict[str, tuple[ServedVersion, asyncio.Task[None]]] = {}
        self._leaving: dict[asyncio.Task[None], Opened] = {}
        self._refused: dict[str, tuple[ServedVersion, float, str]] = {}  # when it may be tried again, and why it was refused

    def opened(self, model: str) -> tuple[str, Opened] | None:
        """The application of a model, by the name of the model."""
        return next(((name, each) for name, each in self._opened.items() if each.model.name == model), None)

    def is_adapter(self, name: str) -> bool:
        """A LoRA adapter of this endpoint has the name."""
        found = self._further.get(name)
        return found is not None and found.is_adapter

    def application_of(self, model: str) -> str | None:
        """Of a model that is opened, or of one that is not, or not yet; None: there is none."""
        if (found := self.opened(model)) is not None:
            return found[0]
        name = further_name(self._endpoint, model)
        return name if name in self._there and name not in self._opened else None

    async def state(self, application: str) -> ModelState:
        """Of one that there is. One that is not opened is called as its application is: a name that `application_of` takes."""
        given_up, opened = self._there.get(application), self._opened.get(application)
        if opened is None:
            name = application.removeprefix(self._endpoint + FURTHER)
            refused = self._refused.get(application)
            failure = given_up or (refused[2] if refused is not None else None)
            return ModelState(name, "starting" if failure is None else "failed", failure or "its engine is starting")
        name, status = opened.model.name, await opened.model.service.cluster.status()
        if status.ready:
            return ModelState(name, status.phase, None)
        if status.phase == "failed" or given_up is not None:
            return ModelState(name, "failed", given_up or status.progress[-1])
        return ModelState(name, status.phase, status.obstacle)

    async def states(self) -> list[ModelState]:
        """Of all that there are, by name."""
        states = await asyncio.gather(*map(self.state, await self.look()))
        return sorted(states, key=lambda state: state.id)

    def services(self) -> list[Service]:
        """Also of models, and versions, that no newcomer finds any more."""
        return [opened.model.service for opened in (*self._opened.values(), *self._leaving.values())]

    async def begin(self) -> None:
        """Returns when all models that there are have been found, or have not answered in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BEGIN_S):
                while await self.look() - self._opened.keys() - self._refused.keys():
                    await asyncio.sleep(TURN_POLL_S)

    async def run(self) -> None:
        """Looks once a second, until cancelled."""
        try:
            while True:
                await self.look()
                await asyncio.sleep(LOOK_S)
        finally:
            tasks = [*(task for _, task in self._opening.values()), *self._leaving]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(each.close() for each in self._opened.values()))

    def check(self) -> None:
        """Errors: whatever ended a task that never should."""
        for task in [task for each in self._opened.values() for task in each.tasks if task.done()]:
            task.result()

    async def look(self) -> set[str]:
        """Returns the applications that there are."""
        try:
            there = await asyncio.to_thread(further_applications, self._endpoint)
        except Exception as error:  # Serve's controller is being replaced: what is served goes on
            logger.warning("Serve does not say which models there are: %s", error)
            return {*self._there}
        self._there = there
        for name in [name for name in self._opening if name not in there]:
            self._opening[name][1].cancel()
        for name in [name for name in self._opened if name not in there]:
            logger.warning("model %s is not served any more", self._opened[name].model.name)
            self._leave(self._opened.pop(name))
        self._refused = {name: refused for name, refused in self._refused.items() if name in there}
        self._engines = {name: engine for name, engine in self._engines.items() if name in there}
        await asyncio.gather(*map(self._follow, there))
        return {*there}

    async def _follow(self, application: str) -> None:
        """Opens what the application serves, if that is something else than is open."""
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                engine = await self._engine_of(application)
                told: ServedVersion = await engine.told.remote()
        except Exception as error:  # it is not there yet, or is being replaced: what is served goes on
            logger.debug("the Engine of %s does not answer: %s", application, error)
            return
        if application in self._opening:
            opening, task = self._opening[application]
            if opening != told:  # it was deployed once more meanwhile
                task.cancel()
            return
        refused, again_s, _ = self._refused.get(application, (None, 0.0, ""))
        opened = self._opened.get(application)
        if (opened is not None and opened.told == told) or (refused == told and time.monotonic() < again_s):
            return
        task = asyncio.create_task(self._open(application, engine, told))
        self._opening[application] = told, task
        task.add_done_callback(lambda _: self._opening.pop(application, None))

    async def _engine_of(self, application: str) -> DeploymentHandle:
        """Errors: KeyError while Serve builds the application, and Serve's."""
        if application not in self._engines:
            handle = await asyncio.to_thread(serve.get_deployment_handle, "Engine", app_name=application)
            self._engines[application] = handle
        return self._engines[application]

    async def _open(self, application: str, engine: DeploymentHandle, told: ServedVersion) -> None:
        """Serves what is told, in place of what the application served before, once there are groups for it."""
        before = self._opened.get(application)
        try:
            async with self._service(application, engine, told) as opened:
                if before is not None:
                    estate = estate_of(application, told.version, told.config.engine)
                    await turn_of(ServeCluster(engine, application, told.version), estate)
                self._check_name(application, opened.model.name)
                opened.adapters.open(before.adapters if before is not None else None)
                self._further.put(opened.model)
                self._opened[application] = opened
        except (ValueError, OSError) as error:  # a checkpoint, a template, a name
            if application not in self._refused or self._refused[application][0] != told:
                logger.error("%s cannot be served: %s", application, error)
            self._refused[application] = told, time.monotonic() + RETRY_S, str(error)
            return
        self._refused.pop(application, None)
        logger.warning("model %s is served, version %s", opened.model.name, told.version)
        if before is not None:
            self._leave(before)

    @contextlib.asynccontextmanager
    async def _service(self, application: str, engine: DeploymentHandle, told: ServedVersion) -> AsyncIterator[Opened]:
        """Runs from here on, unless the body fails. Errors: ValueError, OSError."""
        limits = for_model(self._limits, told.config.serve)
        model = await asyncio.to_thread(ServedModel.of, told.config.engine, limits)
        observer = Observer.open(limits, model.name)
        service = Service(model, ServeCluster(engine, application, told.version), observer)
        shelf = AdapterShelf(namespace_of(application))
        try:
            adapters = await asyncio.to_thread(ServedAdapters, service, told.config.engine, limits, self._further, shelf)
        except BaseException:
            await _to_the_end(asyncio.to_thread(observer.close))
            raise
        tasks = (
            asyncio.create_task(service.run()), asyncio.create_task(observer.run(service)), asyncio.create_task(adapters.run()),
        )  # fmt: skip
        opened = Opened(told, engine, FurtherModel(service, limits), adapters, observer, tasks)
        try:
            yield opened
        except BaseException:
            await opened.close()
            raise

    def _check_name(self, application: str, model: str) -> None:
        """Errors: ValueError if another one has it."""
        taken = [each.model.name for name, each in self._opened.items() if name != application]
        if model in (self._first, *taken) or self.is_adapter(model):
            raise ValueError(f"this endpoint serves another model as {model!r}: give it a served_model_name of its own")

    def _leave(self, opened: Opened) -> None:
        """No newcomer finds it any more; it closes when what is under way has ended."""
        self._further.remove(opened.model)
        opened.adapters.close()
        leaving = asyncio.create_task(_run_empty(opened))
        self._leaving[leaving] = opened
        leaving.add_done_callback(self._leaving.pop)


async def _to_the_end(closing: Coroutine[Any, Any, None]) -> None:
    """Whoever is cancelled while it closes something goes when it is closed: every look cancels what is not wanted any more."""
    task = asyncio.create_task(closing)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as cancellation:
            cancelled = cancellation
    task.result()
    if cancelled is not None:
        raise cancelled


async def _run_empty(opened: Opened) -> None:
    try:
        await asyncio.sleep(LINGER_S)
        while opened.model.service.under_way:
            await asyncio.sleep(TURN_POLL_S)
    finally:
        await opened.close()

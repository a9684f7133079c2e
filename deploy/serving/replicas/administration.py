"""An `Administration` of an endpoint on Ray Serve, from a replica of it. Imports ray."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from cluster.config import EngineConfig
from deploy.config.load import ModelSettings, model_config
from deploy.config.serve import ServeConfig, model_name
from deploy.doors.access import ApiKeys
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.models.adapters import ServedAdapters
from deploy.frontend.models.further import ModelState
from deploy.frontend.service.model import ServedModel
from deploy.serving.replicas.deploying import deploy, deploy_further, further_application
from deploy.serving.replicas.discovery import Discovery, Opened
from deploy.serving.replicas.engine import further_name
from deploy.text.adapters import Adapters
from deploy.text.prompts import read_model_limits
from workers.model.sources.find import find_checkpoint, pinned

CALL_TIMEOUT_S = 10.0

MakeEndpoint = Callable[[EngineConfig, ServeConfig, ApiKeys, int, int | None], Application]
"""`ingress.application`."""


class ServeAdministration:
    """endpoint: makes the application of another checkpoint."""

    def __init__(
        self, engine: DeploymentHandle, config: EngineConfig, limits: ServeConfig, keys: ApiKeys, threads: int,
        discovery: Discovery, adapters: ServedAdapters, endpoint: MakeEndpoint,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._adapters = adapters
        self._config, self._limits, self._keys, self._threads = config, limits, keys, threads
        self._discovery = discovery
        self._endpoint = endpoint
        self._name = model_name(limits.served_model_name, config.model)

    async def drain(self, group: int, replace: bool, model: str | None) -> None:
        engine = self._engine if model in (None, self._name) else (await self._further(model or ""))[1].engine
        refusal: str | None = await self._asked(engine.drain.remote(group, replace))
        if refusal is not None:
            raise RequestError(Fault.CONFLICT, refusal)

    async def roll(self, checkpoint: str, model: str | None, revision: str | None) -> None:
        if model not in (None, self._name):
            await self._roll_further(model or "", checkpoint, revision)
            return
        limits = replace(self._limits, served_model_name=self._name)
        with _invalid("checkpoint"):
            config = await asyncio.to_thread(pinned, replace(self._config, model=checkpoint, revision=revision))
            await asyncio.to_thread(
                read_model_limits, find_checkpoint(config), config.max_model_len, config.tensor_parallel_size, config
            )  # fmt: skip
            await asyncio.to_thread(Adapters, config, self._name)  # those that are named have to fit it
            following = await asyncio.to_thread(
                self._endpoint, config, limits, self._keys, self._threads, await self._asked(self._engine.wanted.remote())
            )
        await asyncio.to_thread(deploy, following, limits)

    async def add(self, model: str, settings: Mapping[str, Any]) -> None:
        with _invalid("settings"):
            config = model_config(model, settings, self._limits)
            config = replace(config, engine=await asyncio.to_thread(pinned, config.engine))
            await asyncio.to_thread(ServedModel.checked, config.engine, config.serve)  # whatever is wrong with it is told now
        there = await self._discovery.look()
        name = further_name(self._limits.app_name, model)
        discovery = self._discovery
        if model == self._name or name in there or discovery.opened(model) is not None or discovery.is_adapter(model):
            raise RequestError(Fault.CONFLICT, f"there is a model {model!r} already: choose another name, or roll or remove it")
        threads = config.engine.threads or self._threads
        with _invalid("settings"):
            made = await asyncio.to_thread(further_application, config, threads)
        await asyncio.to_thread(deploy_further, made, name)

    async def remove(self, model: str) -> None:
        if model == self._name:
            raise RequestError(
                Fault.CONFLICT, f"{model!r} is the endpoint's first model, which ends with it: roll it to another checkpoint"
            )
        await asyncio.to_thread(serve.delete, await self._application_of(model), _blocking=False)

    async def models(self) -> list[ModelState]:
        return await self._discovery.states()

    async def model(self, model: str) -> ModelState:
        return replace(await self._discovery.state(await self._application_of(model)), id=model)

    async def load_adapter(self, name: str, folder: str, beside: str | None, *, in_place: bool) -> None:
        await (await self._adapters_of(beside)).load_adapter(name, folder, beside, in_place=in_place)

    async def unload_adapter(self, name: str, beside: str | None) -> None:
        await (await self._adapters_of(beside)).unload_adapter(name, beside)

    async def _adapters_of(self, model: str | None) -> ServedAdapters:
        """Errors: RequestError NOT_FOUND."""
        return self._adapters if model in (None, self._name) else (await self._further(model or ""))[1].adapters

    async def _application_of(self, model: str) -> str:
        """Also of one that is not served yet, or cannot be. Errors: RequestError NOT_FOUND."""
        await self._discovery.look()
        if (found := self._discovery.application_of(model)) is None:
            raise _not_found(model)
        return found

    async def _roll_further(self, model: str, checkpoint: str, revision: str | None) -> None:
        name, opened = await self._further(model)
        told = opened.told
        limits = replace(told.config.serve, served_model_name=model)
        engine = replace(told.config.engine, model=checkpoint, revision=revision)
        with _invalid("checkpoint"):
            config = ModelSettings(await asyncio.to_thread(pinned, engine), limits)
            await asyncio.to_thread(ServedModel.checked, config.engine, config.serve)
            groups = await self._asked(opened.engine.wanted.remote())
            following = await asyncio.to_thread(further_application, config, told.threads, groups)
        await asyncio.to_thread(deploy_further, following, name)

    async def _further(self, model: str) -> tuple[str, Opened]:
        """Its application, and what of it is served here. Errors: RequestError NOT_FOUND."""
        await self._discovery.look()
        if (found := self._discovery.opened(model)) is None:
            raise _not_found(model)
        return found

    async def _asked(self, answer: Awaitable[Any]) -> Any:
        """Errors: RequestError UNAVAILABLE."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await answer
        except Exception as error:  # a dead replica, a timeout, no scheduler
            raise RequestError(Fault.UNAVAILABLE, f"the engine does not answer: {error}") from error


def _not_found(model: str) -> RequestError:
    return RequestError(Fault.NOT_FOUND, f"no model {model!r} is served here: see /v1/models", param="model")


@contextlib.contextmanager
def _invalid(field: str) -> Iterator[None]:
    """Errors: RequestError INVALID for what a configuration, or a checkpoint, is at fault for."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise RequestError.invalid(str(error), field) from error

"""The endpoint on Ray Serve: one `EngineReplica` (`engine`) that owns the cluster, and stateless `Ingress` replicas before it.

    client ──HTTP, gRPC──▶ Ingress (tokenise, hash, stream, detokenise) ══socket══▶ scheduler actor ══▶ groups
                              └──────────────status──────▶ Engine (owns scheduler and groups)

A model beside the first is an application with an `Engine` alone, which the `Ingress` replicas find (`discovery`). `build` and
`build_further` are what `serve run deploy/configs/serve.yaml` and its like call. Imports ray.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from cluster.config import EngineConfig
from cluster.fleet.estate import namespace_of, version_of
from cluster.fleet.shelf import AdapterShelf
from deploy.config.load import (
    MODEL_SERVE_KEYS,
    ConfigError,
    ModelConfig,
    endpoint_config,
    model_config,
    read_api_keys,
    read_key_priorities,
    read_operators,
    reject_unknown,
)
from deploy.config.serve import FURTHER, ServeConfig, model_name
from deploy.discovery import Discovery, Opened, turn_of
from deploy.doors.access import ApiKeys
from deploy.doors.admin import admin_routes
from deploy.doors.grpc.ingress import GrpcIngress
from deploy.doors.grpc.server import GrpcDoor
from deploy.doors.http import create_app
from deploy.doors.openai.adapters import adapter_routes
from deploy.doors.openai.responses.shared import SharedResponses
from deploy.doors.openai.responses.storing import bounds_of
from deploy.engine import EngineReplica, further_name
from deploy.frontend.adapters import ServedAdapters
from deploy.frontend.clusters import ServeCluster
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.further import FurtherModels, ModelState
from deploy.frontend.service import ServedModel, Service
from deploy.observing.observer import Observer
from deploy.status import status_routes
from deploy.text.adapters import Adapters
from deploy.text.prompts import read_model_limits
from deploy.text.without_torch import import_without_torch
from scheduler.logs import configure
from scheduler.protocol.orphans import Estate
from workers.model.sources.find import find_checkpoint, pinned

logger = logging.getLogger(__name__)

MAX_ASKING = 1024
HEALTH_CHECK_S = 5.0
ENGINE_HEALTH_TIMEOUT_S = 8.0
"""Serve replaces a replica that has not answered three times: one that is stopped, then, in half a minute."""
GRACE_S = 30.0
"""What requests under way have to end in when their replica shall."""
CALL_TIMEOUT_S = 10.0
QUIET = LoggingConfig(enable_access_log=False)
"""Serve would log every call, and front ends ask the Engine how the cluster is once a second."""
MAX_ONGOING_REQUESTS = 8192
"""Per ingress replica: the scheduler's queue is what bounds requests, and says so with a 429."""


class ServeAdministration:
    """An `Administration` of this application, from a replica of it."""

    def __init__(
        self, engine: DeploymentHandle, config: EngineConfig, limits: ServeConfig, keys: ApiKeys, threads: int,
        discovery: Discovery, adapters: ServedAdapters,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._adapters = adapters
        self._config, self._limits, self._keys, self._threads = config, limits, keys, threads
        self._discovery = discovery
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
                application, config, limits, self._keys, self._threads, await self._asked(self._engine.wanted.remote())
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
            config = ModelConfig(await asyncio.to_thread(pinned, engine), limits)
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


@serve.ingress()
class Ingress(GrpcIngress):
    """One front end: holds nothing that outlives a request. If it dies, the scheduler aborts what it had under way."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, engine: DeploymentHandle, config: EngineConfig, limits: ServeConfig, keys: ApiKeys, threads: int, version: str
    ) -> None:
        configure(limits.log_format, role="ingress")
        import_without_torch()
        model = ServedModel.of(config, limits)
        application = serve.get_replica_context().app_name
        self._limits = limits = replace(limits, app_name=application)  # a file may call it anything
        self._keys = keys
        self._observer = Observer.open(limits, model.name)
        cluster = ServeCluster(engine, application, version)
        estate = Estate(namespace_of(application), version, config.adoption_timeout_s)
        await turn_of(cluster, estate)
        self._store = SharedResponses(estate, bounds_of(limits), limits.log_format)
        self._service = Service(model, cluster, self._observer)
        self._further = FurtherModels()
        self._discovery = Discovery(application, model.name, limits, self._further)
        shelf = AdapterShelf(namespace_of(application))
        adapters = ServedAdapters(self._service, config, limits, self._further, shelf)
        self._administration = ServeAdministration(engine, config, limits, keys, threads, self._discovery, adapters)
        adapters.open()
        await self._discovery.begin()
        await adapters.look()
        self._tasks = [
            asyncio.create_task(self._service.run()), asyncio.create_task(self._observer.run(self._service)),
            asyncio.create_task(self._discovery.run()), asyncio.create_task(adapters.run()),
        ]  # fmt: skip
        self.door = GrpcDoor(self._service, limits, keys, self._abort_everywhere, self._further)

    def __serve_build_asgi_app__(self) -> FastAPI:
        pages = status_routes(self._service, self._further)
        pages.include_router(admin_routes(self._administration))
        pages.include_router(adapter_routes(self._administration, self._limits))
        return create_app(
            self._service, self._limits, self._keys, pages=pages, further=self._further, store=self._store,
            names_responses=False,  # Serve names them
        )  # fmt: skip

    async def abort_here(self, request_id: str, account: str) -> int:
        """Ends what this replica has under way by that id on that account; how many requests that were."""
        return sum(service.abort(request_id, account) for service in self._services())

    async def end_here(self) -> None:
        """The endpoint ends: so does what this replica has under way, and its clients are told."""
        for service in self._services():
            service.end_all()

    def _services(self) -> list[Service]:
        """Of all models."""
        return [self._service, *self._discovery.services()]

    async def _abort_everywhere(self, request_id: str, account: str) -> int:
        replicas = serve.get_deployment_handle("Ingress", app_name=serve.get_replica_context().app_name)
        return sum(await replicas.broadcast("abort_here", request_id, account).results_async(timeout_s=CALL_TIMEOUT_S))

    async def check_health(self) -> None:
        """Errors: whatever ended a task that never should."""
        for task in self._tasks:
            if task.done():
                await task
        self._discovery.check()

    async def __del__(self) -> None:
        if not hasattr(self, "_tasks"):
            return  # it could not be made, and what is wrong has been said
        for task in reversed(self._tasks):  # the observer first: what it has goes out through the service
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await asyncio.to_thread(self._observer.close)
        await self._store.close()


def build(args: Mapping[str, Any]) -> Application:
    """The application from the tree that configuration files hold: `engine:` and `serve:`. Errors: ConfigError."""
    config = endpoint_config(args)
    if config.further:
        name = config.further[0].serve.served_model_name
        raise ConfigError(
            f"models: of several, Serve's file has an application each: here the first alone, and {name!r} as an application "
            f"'manta{FURTHER}...' with import_path deploy.app:build_further (docs/deploy.md)"
        )
    if "groups" in args.get("engine", {}):
        logger.warning(
            "engine.groups stands below args, where a change of it starts replicas anew: below deployments, as the Engine's "
            "user_config: {groups: N}, groups come and go while requests run"
        )
    keys = ApiKeys(read_api_keys(config.serve), read_key_priorities(config.serve), read_operators(config.serve))
    return application(config.engine, config.serve, keys, config.engine.threads or 1)


def build_further(args: Mapping[str, Any]) -> Application:
    """A model beside the first of an endpoint, of the same tree: its `engine:`, and of `serve:` what is a model's own. Errors:
    ConfigError."""
    reject_unknown(args.get("serve") or {}, (*MODEL_SERVE_KEYS, "served_model_name", "log_format"), "serve.")
    config = endpoint_config(args)
    if config.further:
        raise ConfigError("models: names several: write an application for each of them")
    return further_application(ModelConfig(config.engine, config.serve), config.engine.threads or 1)


def application(
    engine: EngineConfig, limits: ServeConfig, keys: ApiKeys, threads: int, groups: int | None = None
) -> Application:
    """threads: of each CPU rank. groups: that are wanted now, if not as many as the configuration says."""
    engine = pinned(engine)
    version = version_of(engine, limits, threads)
    owner = _engine_deployment(groups or engine.groups, GRACE_S)
    front = serve.deployment(
        name="Ingress", num_replicas=limits.replicas, max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 1}, health_check_period_s=HEALTH_CHECK_S, graceful_shutdown_timeout_s=GRACE_S,
        max_surge_percent=100,  # the next one is there before one goes
    )(Ingress)  # fmt: skip
    return front.bind(owner.bind(engine, limits, threads, version), engine, limits, keys, threads, version)


def further_application(model: ModelConfig, threads: int, groups: int | None = None) -> Application:
    """An Engine alone, which front ends find by the name of the application. Its requests have all their time to end in."""
    engine = pinned(model.engine)
    version = version_of(engine, model.serve, threads)
    owner = _engine_deployment(groups or engine.groups, model.serve.request_timeout_s + GRACE_S)
    return owner.bind(engine, model.serve, threads, version, further=True)


def _engine_deployment(groups: int, grace_s: float) -> serve.Deployment:
    return serve.deployment(
        name="Engine", num_replicas=1, max_ongoing_requests=MAX_ASKING, ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH_CHECK_S, health_check_timeout_s=ENGINE_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=grace_s, logging_config=QUIET, user_config={"groups": groups},
    )(EngineReplica)  # fmt: skip


def deploy_further(made: Application, name: str) -> None:
    """As `deploy`. Nobody reaches it but through front ends."""
    serve.run_many([serve.RunTarget(target=made, name=name, route_prefix=None)], wait_for_applications_running=False)


def deploy(made: Application, limits: ServeConfig) -> None:
    """Hands the application to Serve, in place of the one of that name if there is one. Does not wait until it runs."""
    target = serve.RunTarget(target=made, name=limits.app_name, route_prefix=limits.route_prefix)
    serve.run_many([target], wait_for_applications_running=False)

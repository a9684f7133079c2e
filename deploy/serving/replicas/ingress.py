"""The `Ingress` deployment, a front end of an endpoint on Ray Serve with every door and every model; and the application of it
and the `Engine`. Imports ray."""

import asyncio
import contextlib
import logging
import time
from dataclasses import replace

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from cluster.config import EngineConfig
from cluster.fleet.estate import estate_of, namespace_of, version_of
from cluster.fleet.shelf import AdapterShelf
from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.doors.admin import admin_routes
from deploy.doors.grpc.ingress import GrpcIngress
from deploy.doors.grpc.server import GrpcDoor
from deploy.doors.http.app import create_app
from deploy.doors.openai.adapters import adapter_routes
from deploy.doors.openai.responses.store.shared import SharedResponses
from deploy.doors.openai.responses.store.storing import bounds_of
from deploy.frontend.clusters import ServeCluster
from deploy.frontend.models.adapters import ServedAdapters
from deploy.frontend.models.further import FurtherModels
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from deploy.observing.observer import Observer
from deploy.serving.replicas.administration import ServeAdministration
from deploy.serving.replicas.deploying import FRONT_END_HEALTH_TIMEOUT_S, GRACE_S, HEALTH_CHECK_S, engine_deployment
from deploy.serving.replicas.discovery import Discovery, turn_of
from deploy.status.routes import status_routes
from deploy.text.without_torch import import_without_torch
from scheduler.logs import configure
from scheduler.protocol.sentinel import watch_this_process
from workers.model.sources.find import pinned

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 10.0
UNASKED_S = 4 * HEALTH_CHECK_S
MAX_ONGOING_REQUESTS = 8192
"""Per ingress replica: the scheduler's queue is what bounds requests, and says so with a 429."""


@serve.ingress()
class Ingress(GrpcIngress):
    """One front end: holds nothing that outlives a request. If it dies, the scheduler aborts what it had under way."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, engine: DeploymentHandle, config: EngineConfig, limits: ServeConfig, keys: ApiKeys, threads: int, version: str
    ) -> None:
        configure(limits.log_format, role="ingress")
        watch_this_process()
        import_without_torch()
        model = ServedModel.of(config, limits)
        name = serve.get_replica_context().app_name
        self._limits = limits = replace(limits, app_name=name)  # a file may call it anything
        self._keys = keys
        self._observer = Observer.open(limits, model.name)
        cluster = ServeCluster(engine, name, version)
        estate = estate_of(name, version, config)
        await turn_of(cluster, estate)
        self._store = SharedResponses(estate, bounds_of(limits), limits.log_format)
        self._service = Service(model, cluster, self._observer)
        self._further = FurtherModels()
        self._discovery = Discovery(name, model.name, limits, self._further)
        shelf = AdapterShelf(namespace_of(name))
        adapters = ServedAdapters(self._service, config, limits, self._further, shelf)
        self._administration = ServeAdministration(
            engine, config, limits, keys, threads, self._discovery, adapters, application
        )
        adapters.open()
        await self._discovery.begin()
        await adapters.look()
        self._tasks = [
            asyncio.create_task(self._service.run()), asyncio.create_task(self._observer.run(self._service)),
            asyncio.create_task(self._discovery.run()), asyncio.create_task(adapters.run()),
        ]  # fmt: skip
        self._asked_s = time.monotonic()
        self.door = GrpcDoor(self._service, limits, keys, self._abort_everywhere, self._further, self._is_leaving)

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
        self._asked_s = time.monotonic()
        for task in self._tasks:
            if task.done():
                await task
        self._discovery.check()

    def _is_leaving(self) -> bool:
        """Serve takes it away, and then asks for its health no more; or nothing is left of Serve that would ask."""
        return time.monotonic() - self._asked_s > UNASKED_S

    async def __del__(self) -> None:
        if not hasattr(self, "_tasks"):
            return  # it could not be made, and what is wrong has been said
        for task in reversed(self._tasks):  # the observer first: what it has goes out through the service
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await asyncio.to_thread(self._observer.close)
        await self._store.close()


def application(
    engine: EngineConfig, limits: ServeConfig, keys: ApiKeys, threads: int, groups: int | None = None,
    version: str | None = None,
) -> Application:  # fmt: skip
    """threads: of each CPU rank. groups: that are wanted now, if not as many as the configuration says. version: of all that,
    where it is known."""
    engine = pinned(engine)
    version = version or version_of(engine, limits, threads)
    owner = engine_deployment(groups or engine.groups, GRACE_S)
    front = serve.deployment(
        name="Ingress", num_replicas=limits.replicas, max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 1}, health_check_period_s=HEALTH_CHECK_S,
        health_check_timeout_s=FRONT_END_HEALTH_TIMEOUT_S, graceful_shutdown_timeout_s=limits.request_timeout_s + GRACE_S,
        max_surge_percent=100,  # the next one is there before one goes
    )(Ingress)  # fmt: skip
    return front.bind(owner.bind(engine, limits, threads, version), engine, limits, keys, threads, version)

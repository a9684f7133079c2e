"""The endpoint on Ray Serve: one `EngineReplica` (`engine`) that owns the cluster, and stateless `Ingress` replicas before it.

    client ──HTTP, gRPC──▶ Ingress (tokenise, hash, stream, detokenise) ══socket══▶ scheduler actor ══▶ groups
                              └──────────────status──────▶ Engine (owns scheduler and groups)

`build` is what `serve run deploy/configs/serve.yaml` and `manta serve` call. Imports ray.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, LoggingConfig

from cluster.config import EngineConfig
from cluster.fleet.estate import namespace_of, version_of
from cluster.fleet.rolling import serves_another_version
from deploy.config.load import ConfigError, endpoint_config, read_api_keys, read_key_priorities, read_operators
from deploy.config.serve import ServeConfig, model_name
from deploy.doors.access import ApiKeys
from deploy.doors.admin import admin_routes
from deploy.doors.grpc.ingress import GrpcIngress
from deploy.doors.grpc.server import SERVICER_FUNCTIONS, GrpcDoor
from deploy.doors.http import create_app
from deploy.engine import EngineReplica
from deploy.frontend.clusters import ServeCluster
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.service import ServedModel, Service
from deploy.observing.observer import Observer
from deploy.status import status_routes
from deploy.text.prompts import read_model_limits
from deploy.text.without_torch import import_without_torch
from scheduler.logs import configure
from scheduler.protocol.orphans import Estate

logger = logging.getLogger(__name__)

MAX_ASKING = 1024
HEALTH_CHECK_S = 5.0
TURN_POLL_S = 0.5
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
        self, engine: DeploymentHandle, config: EngineConfig, limits: ServeConfig, keys: ApiKeys, threads: int
    ) -> None:
        self._engine = engine
        self._config, self._limits, self._keys, self._threads = config, limits, keys, threads

    async def drain(self, group: int, replace: bool) -> None:
        refusal: str | None = await self._asked(self._engine.drain.remote(group, replace))
        if refusal is not None:
            raise RequestError(Fault.CONFLICT, refusal)

    async def roll(self, model: str) -> None:
        limits = replace(self._limits, served_model_name=model_name(self._limits.served_model_name, self._config.model))
        config = replace(self._config, model=model)
        try:
            await asyncio.to_thread(
                read_model_limits, Path(model), config.max_model_len, config.tensor_parallel_size, config.model_implementation
            )
            following = await asyncio.to_thread(
                application, config, limits, self._keys, self._threads, await self._asked(self._engine.wanted.remote())
            )
        except (ValueError, OSError) as error:
            raise RequestError.invalid(str(error), "model") from error
        await asyncio.to_thread(deploy, following, limits)

    async def _asked(self, answer: Awaitable[Any]) -> Any:
        """Errors: RequestError UNAVAILABLE."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await answer
        except Exception as error:  # a dead replica, a timeout, no scheduler
            raise RequestError(Fault.UNAVAILABLE, f"the engine does not answer: {error}") from error


@serve.ingress()
class Ingress(GrpcIngress):
    """One front end: holds nothing that outlives a request. If it dies, the scheduler aborts what it had under way."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, engine: DeploymentHandle, config: EngineConfig, limits: ServeConfig, keys: ApiKeys, threads: int, version: str
    ) -> None:
        configure(limits.log_format, role="ingress")
        import_without_torch()
        name = model_name(limits.served_model_name, config.model)
        model = ServedModel.read(
            name, Path(config.model), config.max_model_len, config.tensor_parallel_size, limits.chat_template,
            config.model_implementation,
        )  # fmt: skip
        self._limits = limits
        self._keys = keys
        self._administration = ServeAdministration(engine, config, limits, keys, threads)
        self._observer = Observer.open(limits, model.name)
        application = serve.get_replica_context().app_name
        cluster = ServeCluster(engine, application, version)
        await _turn_of(cluster, Estate(namespace_of(application), version, config.adoption_timeout_s))
        self._service = Service(model, cluster, self._observer)
        self._tasks = [asyncio.create_task(self._service.run()), asyncio.create_task(self._observer.run(self._service))]
        self.door = GrpcDoor(self._service, limits, keys, self._abort_everywhere)

    def __serve_build_asgi_app__(self) -> FastAPI:
        pages = status_routes(self._service)
        pages.include_router(admin_routes(self._administration))
        return create_app(self._service, self._limits, self._keys, pages=pages, names_responses=False)  # Serve names them

    async def abort_here(self, request_id: str, account: str) -> int:
        """Ends what this replica has under way by that id on that account; how many requests that were."""
        return self._service.abort(request_id, account)

    async def end_here(self) -> None:
        """The endpoint ends: so does what this replica has under way, and its clients are told."""
        self._service.end_all()

    async def _abort_everywhere(self, request_id: str, account: str) -> int:
        replicas = serve.get_deployment_handle("Ingress", app_name=serve.get_replica_context().app_name)
        return sum(await replicas.broadcast("abort_here", request_id, account).results_async(timeout_s=CALL_TIMEOUT_S))

    async def check_health(self) -> None:
        """Errors: whatever ended a task that never should."""
        for task in self._tasks:
            if task.done():
                await task

    async def __del__(self) -> None:
        for task in reversed(self._tasks):  # the observer first: what it has goes out through the service
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await asyncio.to_thread(self._observer.close)


async def _turn_of(cluster: ServeCluster, estate: Estate) -> None:
    """Waits until groups of this version are up, while front ends of another one serve."""
    while not await cluster.groups_are_up() and await asyncio.to_thread(serves_another_version, estate):
        await asyncio.sleep(TURN_POLL_S)


def build(args: Mapping[str, Any]) -> Application:
    """The application from the tree that configuration files hold: `engine:` and `serve:`. Errors: ConfigError."""
    config = endpoint_config(args)
    if "groups" in args.get("engine", {}):
        logger.warning(
            "engine.groups stands below args, where a change of it starts replicas anew: below deployments, as the Engine's "
            "user_config: {groups: N}, groups come and go while requests run"
        )
    keys = ApiKeys(read_api_keys(config.serve), read_key_priorities(config.serve), read_operators(config.serve))
    return application(config.engine, config.serve, keys, config.engine.threads or 1)


def application(
    engine: EngineConfig, limits: ServeConfig, keys: ApiKeys, threads: int, groups: int | None = None
) -> Application:
    """threads: of each CPU rank. groups: that are wanted now, if not as many as the configuration says."""
    version = version_of(engine, limits, threads)
    owner = serve.deployment(
        name="Engine", num_replicas=1, max_ongoing_requests=MAX_ASKING, ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH_CHECK_S, graceful_shutdown_timeout_s=30, logging_config=QUIET,
        user_config={"groups": groups or engine.groups},
    )(EngineReplica)  # fmt: skip
    front = serve.deployment(
        name="Ingress", num_replicas=limits.replicas, max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 1}, health_check_period_s=HEALTH_CHECK_S, graceful_shutdown_timeout_s=GRACE_S,
        max_surge_percent=100,  # the next one is there before one goes
    )(Ingress)  # fmt: skip
    return front.bind(owner.bind(engine, limits, threads, version), engine, limits, keys, threads, version)


def deploy(made: Application, limits: ServeConfig) -> None:
    """Hands the application to Serve, in place of the one of that name if there is one. Does not wait until it runs."""
    target = serve.RunTarget(target=made, name=limits.app_name, route_prefix=limits.route_prefix)
    serve.run_many([target], wait_for_applications_running=False)


def check_vacant(limits: ServeConfig) -> None:
    """Errors: ConfigError that names what runs on the cluster already where this application shall be."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    details = client.get_serve_details()
    for name, running in details["applications"].items():
        if limits.app_name == name or limits.route_prefix == running["route_prefix"]:
            raise ConfigError(
                f"the Ray cluster runs the application {name!r} at {running['route_prefix']} already ({running['status']}): "
                "end it (`serve shutdown` ends all), or choose another --app-name and another --route-prefix"
            )
    http, grpc = details["http_options"] or {}, details["grpc_options"] or {}
    if (http.get("host"), http.get("port")) != (limits.host, limits.port):
        raise ConfigError(
            f"Ray Serve listens at {http.get('host')}:{http.get('port')} on this cluster, which cannot change while it runs: "
            f"say --host {http.get('host')} --port {http.get('port')}, or end it with `serve shutdown`"
        )
    if limits.grpc_port is not None and (not grpc.get("grpc_servicer_functions") or grpc.get("port") != limits.grpc_port):
        raise ConfigError(
            "Ray Serve was started on this cluster without this gRPC port, which cannot change while it runs: leave "
            "--grpc-port out, or end Serve with `serve shutdown`"
        )


def failure(app_name: str) -> str | None:
    """Why Serve has given the application up, or that it is not there any more; None while neither is so."""
    now = serve.status().applications.get(app_name)
    if now is None:
        return f"the application {app_name!r} was deleted"
    return now.message if now.status == ApplicationStatus.DEPLOY_FAILED else None


def start_proxies(limits: ServeConfig) -> None:
    """Starts Serve on the Ray cluster that this process has joined; does nothing where it runs already."""
    grpc = None
    if limits.grpc_port is not None:
        grpc = gRPCOptions(port=limits.grpc_port, grpc_servicer_functions=list(SERVICER_FUNCTIONS))
    serve.start(http_options=HTTPOptions(host=limits.host, port=limits.port), grpc_options=grpc)

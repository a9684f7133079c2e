"""The endpoint on Ray Serve: one `EngineReplica` that owns the cluster, and stateless `Ingress` replicas before it.

    client ──HTTP, gRPC──▶ Ingress (tokenise, hash, stream, detokenise) ══socket══▶ scheduler actor ══▶ groups
                              └──────────────status──────▶ Engine (owns scheduler and groups)

`build` is what `serve run deploy/configs/serve.yaml` and `manta serve` call. Imports ray.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, LoggingConfig

from cluster.config import EngineConfig
from cluster.fleet.autoscale import Autoscaler
from cluster.fleet.estate import namespace_of, version_of
from cluster.fleet.fleet import Fleet
from cluster.launch import plan
from deploy.config.load import ConfigError, endpoint_config, read_api_keys, read_key_priorities, read_operators, reject_unknown
from deploy.config.serve import ServeConfig, model_name
from deploy.doors.access import ApiKeys
from deploy.doors.admin import admin_routes
from deploy.doors.grpc.ingress import GrpcIngress
from deploy.doors.grpc.server import SERVICER_FUNCTIONS, GrpcDoor
from deploy.doors.http import create_app
from deploy.frontend.clusters import ServeCluster
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.service import ServedModel, Service
from deploy.observing.observer import Observer
from deploy.status import status_routes
from deploy.text.without_torch import import_without_torch
from scheduler.logs import configure
from scheduler.protocol.orphans import Estate
from scheduler.server.stats import ClusterStatus

logger = logging.getLogger(__name__)

MAX_ASKING = 1024
LIVE_KEYS = ("groups",)
"""Of the Engine's `user_config`, which Serve hands to the replica that runs; all else starts the replicas anew."""
HEALTH_CHECK_S = 5.0
GRACE_S = 10.0
"""What requests under way have to end in when their replica shall."""
CALL_TIMEOUT_S = 10.0
QUIET = LoggingConfig(enable_access_log=False)
"""Serve would log every call, and front ends ask the Engine how the cluster is once a second."""
MAX_ONGOING_REQUESTS = 8192
"""Per ingress replica: the scheduler's queue is what bounds requests, and says so with a 429."""


class EngineReplica:
    """Owns the fleet. Serve starts another if it dies, is lost for good or shall be replaced; scheduler and groups run on
    meanwhile, and are taken over by that one. The end of the application is theirs.

    It comes up at once and starts the fleet beside: until that is ready, `status` says how far it is.
    """

    def __init__(self, engine: EngineConfig, limits: ServeConfig, threads: int, version: str) -> None:
        configure(limits.log_format, role="engine")
        self._version = version
        self._told = engine, limits, threads
        self._failure: str | None = None
        self._autoscaler: Autoscaler | None = None
        self._application = serve.get_replica_context().app_name
        estate = Estate(namespace_of(self._application), version, engine.adoption_timeout_s)
        self._fleet = Fleet(engine, plan(engine, threads), self._fail, limits, limits.log_format, estate)
        self._starter = threading.Thread(target=self._start, name="manta-starter", daemon=True)
        self._starter.start()

    async def version(self) -> str:
        """Of what is served from now on."""
        return self._version

    async def status(self, maps: bool = False) -> ClusterStatus:
        status = await asyncio.to_thread(self._fleet.status, maps)
        if self._failure is None:
            return status
        return msgspec.structs.replace(status, phase="failed", progress=(*status.progress, self._failure))

    async def drain(self, group: int, replace: bool) -> str | None:
        """Lets a group run empty, see `Fleet.drain`. Why it cannot; None: it does."""
        if replace and await asyncio.to_thread(version_of, *self._told) != self._version:
            return "the checkpoint is not the one that is served any more: deploy it as another (docs/deploy.md)"
        try:
            await asyncio.to_thread(self._fleet.drain, group, replace=replace)
        except ValueError as error:
            return str(error)
        return None

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """What of the configuration changes while requests run: `groups`. Serve calls it at the start and whenever
        `user_config` has changed. What cannot be done is logged and left as it is: an error would make Serve replace this
        replica."""
        try:
            reject_unknown(user_config, LIVE_KEYS, "user_config.")
            self._fleet.resize(msgspec.convert(user_config.get("groups", self._fleet.wanted), int))
        except ValueError as error:
            logger.error("this change of user_config is refused: %s", error)

    async def check_health(self) -> None:
        """Errors: RuntimeError once no group is left or the start has failed: Serve then starts another replica."""
        if self._failure is not None:
            raise RuntimeError(self._failure)

    def __del__(self) -> None:
        if not _is_wanted(self._application):
            if self._autoscaler is not None:
                self._autoscaler.close()
            self._fleet.close()

    def _start(self) -> None:
        try:
            self._fleet.start(logger.info)
            self._autoscaler = Autoscaler.of(self._fleet)
        except Exception as error:
            logger.exception("the cluster could not be started")
            self._fail(f"the cluster could not be started: {error}")

    def _fail(self, reason: str) -> None:
        self._failure = reason


class ServeAdministration:
    """An `Administration` that asks the `Engine` deployment."""

    def __init__(self, engine: DeploymentHandle) -> None:
        self._engine = engine

    async def drain(self, group: int, replace: bool) -> None:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                refusal: str | None = await self._engine.drain.remote(group, replace)
        except Exception as error:  # a dead replica, a timeout, no scheduler
            raise RequestError(Fault.UNAVAILABLE, f"the engine does not answer: {error}") from error
        if refusal is not None:
            raise RequestError(Fault.CONFLICT, refusal)


@serve.ingress()
class Ingress(GrpcIngress):
    """One front end: holds nothing that outlives a request. If it dies, the scheduler aborts what it had under way."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, engine: DeploymentHandle, config: EngineConfig, limits: ServeConfig, keys: ApiKeys, version: str
    ) -> None:
        configure(limits.log_format, role="ingress")
        import_without_torch()
        name = model_name(limits.served_model_name, config.model)
        model = ServedModel.read(
            name, Path(config.model), config.max_model_len, config.tensor_parallel_size, limits.chat_template
        )
        self._limits = limits
        self._keys = keys
        self._administration = ServeAdministration(engine)
        self._observer = Observer.open(limits, model.name)
        cluster = ServeCluster(engine, serve.get_replica_context().app_name, version)
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


def build(args: Mapping[str, Any]) -> Application:
    """The application from the tree that configuration files hold: `engine:` and `serve:`. Errors: ConfigError."""
    config = endpoint_config(args)
    if "groups" in args.get("engine", {}):
        logger.warning(
            "engine.groups stands below args, where a change of it starts everything anew: below deployments, as the Engine's "
            "user_config: {groups: N}, groups come and go while requests run"
        )
    keys = ApiKeys(read_api_keys(config.serve), read_key_priorities(config.serve), read_operators(config.serve))
    return application(config.engine, config.serve, keys, config.engine.threads or 1)


def application(engine: EngineConfig, limits: ServeConfig, keys: ApiKeys, threads: int) -> Application:
    """threads: of each CPU rank."""
    version = version_of(engine, limits, threads)
    owner = serve.deployment(
        name="Engine", num_replicas=1, max_ongoing_requests=MAX_ASKING, ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH_CHECK_S, graceful_shutdown_timeout_s=30, logging_config=QUIET,
        user_config={"groups": engine.groups},
    )(EngineReplica)  # fmt: skip
    front = serve.deployment(
        name="Ingress", num_replicas=limits.replicas, max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 1}, health_check_period_s=HEALTH_CHECK_S, graceful_shutdown_timeout_s=GRACE_S,
    )(Ingress)  # fmt: skip
    return front.bind(owner.bind(engine, limits, threads, version), engine, limits, keys, version)


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


def _is_wanted(application: str) -> bool:
    """Whether Serve, which ends a replica of it, will start another: asked from that replica."""
    asked: Future[ApplicationStatus | None] = Future()

    def ask() -> None:
        with contextlib.suppress(Exception):  # Serve itself has gone
            now = serve.status().applications.get(application)
            asked.set_result(now.status if now is not None else None)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return asked.result(timeout=CALL_TIMEOUT_S) not in (None, ApplicationStatus.DELETING)
    except TimeoutError:
        return False


def start_proxies(limits: ServeConfig) -> None:
    """Starts Serve on the Ray cluster that this process has joined; does nothing where it runs already."""
    grpc = None
    if limits.grpc_port is not None:
        grpc = gRPCOptions(port=limits.grpc_port, grpc_servicer_functions=list(SERVICER_FUNCTIONS))
    serve.start(http_options=HTTPOptions(host=limits.host, port=limits.port), grpc_options=grpc)

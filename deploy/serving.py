"""`manta serve`: the endpoint on Ray Serve, or in this one process, until Ctrl-C. Says what it does, then where it listens.

Imports ray only for an endpoint on Ray.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from cluster.config import own_threads
from cluster.engine import EngineError
from deploy.access import ApiKeys
from deploy.clusters import LocalCluster
from deploy.config import Config, bound_openmp_spin, choose_proxy, read_api_keys, read_key_priorities
from deploy.display import StartView
from deploy.exits import interrupts_held
from deploy.observer import Observer
from deploy.serve_config import ServeConfig, model_name
from deploy.service import ServedModel, Service
from scheduler.logs import configure
from scheduler.stats import ClusterStatus

POLL_S = 0.25
CALL_TIMEOUT_S = 10.0
GRPC_GRACE_S = 5.0
SPARE_CPUS = 2
"""Logical ones, for what Serve itself places."""


def serve(config: Config, view: StartView) -> None:
    """Serves until interrupted. Errors: ConfigError, ValueError, OSError for what was asked; EngineError for the rest."""
    keys = ApiKeys(read_api_keys(config.serve), read_key_priorities(config.serve))
    bound_openmp_spin()
    if config.engine.local:
        asyncio.run(_serve_here(config, keys, view))
    else:
        _serve_on_ray(config, keys, view)


# ---- in this process ----


async def _serve_here(config: Config, keys: ApiKeys, view: StartView) -> None:
    import uvicorn

    from deploy.connections import bounded_protocol
    from deploy.http import create_app

    limits = config.serve
    model = read_model(config)
    observer = Observer.open(limits, model.name)
    service = Service(model, LocalCluster(config.engine), observer)
    app = create_app(service, limits, keys)
    bounded = bounded_protocol(limits)
    server = uvicorn.Server(
        uvicorn.Config(app, host=limits.host, port=limits.port, http=bounded, ws="none", log_level="warning", access_log=False)
    )
    tasks = [asyncio.create_task(service.run())]
    try:
        while not await service.ready():
            view.show(await service.cluster.status())
            await _first_failure(tasks, POLL_S)
        tasks.append(asyncio.create_task(observer.run(service)))
        configure(limits.log_format)  # from here on: lines of the start would run through its view
        async with _grpc(service, limits, keys):
            view.ready(model.name, limits)
            await server.serve()
    finally:
        for task in reversed(tasks):  # the observer first: what it has goes out through the service
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await asyncio.to_thread(observer.close)


@contextlib.asynccontextmanager
async def _grpc(service: Service, limits: ServeConfig, keys: ApiKeys) -> AsyncIterator[None]:
    """A gRPC server beside the HTTP one, if it was asked for."""
    if limits.grpc_port is None:
        yield
        return
    from deploy.grpc_server import GrpcDoor, start_server

    server, _ = await start_server(GrpcDoor(service, limits, keys), limits)
    try:
        yield
    finally:
        await server.stop(GRPC_GRACE_S)


async def _first_failure(tasks: Sequence["asyncio.Task[None]"], wait_s: float) -> None:
    """Waits a while; raises what a task ended with."""
    done, _ = await asyncio.wait(tasks, timeout=wait_s)
    for task in done:
        task.result()


# ---- on Ray ----


def _serve_on_ray(config: Config, keys: ApiKeys, view: StartView) -> None:
    limits, engine = config.serve, config.engine
    model = read_model(config)  # the user's mistakes, before anything is started
    threads = own_threads(engine)
    choose_proxy(limits)
    from cluster.launch import connect_ray

    ranks = (engine.max_groups or engine.groups) * engine.tensor_parallel_size
    owns_ray = connect_ray(engine, ranks * threads + limits.replicas + SPARE_CPUS, view.say)
    import ray
    from ray import serve as ray_serve

    from deploy import app

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        app.start_proxies(limits)
        view.say("starting the front end")
        ray_serve.run(
            app.application(engine, limits, keys, threads if owns_ray else engine.threads or 1), name=app.APP_NAME
        )
        owner = ray_serve.get_deployment_handle("Engine", app_name=app.APP_NAME)
        _await_ready(lambda: owner.status.remote().result(timeout_s=CALL_TIMEOUT_S), limits.replicas, view)
        view.ready(model.name, limits)
        while True:
            time.sleep(1.0)
    finally:
        with interrupts_held():
            view.close()
            with contextlib.suppress(Exception):  # whatever is left ends with Ray
                ray_serve.shutdown() if owns_ray else ray_serve.delete(app.APP_NAME)
            if owns_ray:
                ray.shutdown()


def _await_ready(status: Callable[[], ClusterStatus], replicas: int, view: StartView) -> None:
    """Returns when a group is up and every replica reaches the scheduler: whichever a client meets first, it answers.
    Errors: EngineError with the reason, if the start has failed."""
    while True:
        now = status()
        if now.phase == "failed":
            raise EngineError(now.progress[-1])
        if now.ready and now.front_ends >= replicas:
            return
        view.show(now)
        time.sleep(POLL_S)


def read_model(config: Config) -> ServedModel:
    """Errors: ValueError, OSError."""
    engine = config.engine
    name = model_name(config.serve.served_model_name, engine.model)
    return ServedModel.read(name, Path(engine.model), engine.max_model_len, engine.tensor_parallel_size)

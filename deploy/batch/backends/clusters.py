"""The groups that answer a job: started for it, in this process or on Ray, or those of a Manta application on the same Ray.

They start in the caller's thread, before any event loop: a signal ends their start too, and its errors are the caller's.
Imports the engine; torch and ray once a cluster is opened.
"""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from msgspec.structs import replace

from cluster.config import EngineConfig, own_threads
from cluster.engine import Engine, EngineLost, OnDeltas, OnFailure, Progress, RequestStream
from cluster.remote import SchedulerStream
from deploy.config.load import ConfigError
from deploy.frontend.clusters import Cluster, ServeCluster
from deploy.terminal.exits import interrupts_held
from scheduler.protocol.messages import Deltas
from scheduler.server.stats import ClusterStatus
from workers.config import ResolvedWorker
from workers.model.sources.find import pinned


@contextmanager
def open_cluster(config: EngineConfig, app: str | None, progress: Progress) -> Iterator[Cluster]:
    """app: the Serve application whose groups the job shall use; None starts groups of the job's own, and ends them.

    Errors: ConfigError, ValueError, OSError for what was asked; EngineError for the rest.
    """
    if app is not None:
        yield _serve_cluster(config, app, progress)
    elif config.local:
        with closing(HereCluster(pinned(config), progress)) as here:
            yield here
    else:
        with _fleet(pinned(config), progress) as fleet:
            yield fleet


class HereCluster:
    """Groups in this process. If they are lost they stay so: the job ends, and another goes on."""

    def __init__(self, config: EngineConfig, progress: Progress) -> None:
        from cluster.local.engine import start_local

        self._config = config
        self._on_deltas: OnDeltas = _nobody_asked
        self._on_failure: OnFailure = lambda _: None
        self._lost: str | None = None
        self._engine: Engine = start_local(config, lambda deltas: self._on_deltas(deltas), self._fail, progress)

    def connect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> RequestStream:
        self._on_deltas, self._on_failure = on_deltas, on_failure
        if self._lost is not None:
            raise EngineLost(self._lost)
        return self._engine

    async def status(self, maps: bool = False) -> ClusterStatus:  # noqa: ARG002
        if self._lost is not None:
            return self._status("stopped", progress=(self._lost,))
        return self._status("ready", engine=self._engine.stats())

    def close(self) -> None:
        self._engine.close()

    def _status(self, phase: str, **more: Any) -> ClusterStatus:
        return ClusterStatus(phase=phase, model=self._config.model, revision=self._config.revision, **more)

    def _fail(self, reason: str) -> None:
        self._lost = reason
        self._on_failure(reason)


def _nobody_asked(deltas: Deltas) -> None:
    raise AssertionError(f"deltas before the first request: {deltas}")


class FleetCluster:
    """Groups on Ray. The scheduler and the groups come back when they die; once no group will, all is lost."""

    def __init__(self, config: EngineConfig, resolved: ResolvedWorker) -> None:
        from cluster.fleet.fleet import Fleet

        self._lost: str | None = None
        self.fleet = Fleet(config, resolved, self._lose)

    def connect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> RequestStream:
        if self._lost is not None:
            raise EngineLost(self._lost)
        address = self.fleet.current().address
        return SchedulerStream(address.host, address.port, address.token, on_deltas, on_failure)

    async def status(self, maps: bool = False) -> ClusterStatus:
        status = await asyncio.to_thread(self.fleet.status, maps)
        return status if self._lost is None else replace(status, phase="stopped", engine=None, progress=(self._lost,))

    def _lose(self, reason: str) -> None:
        self._lost = reason


@contextmanager
def _fleet(config: EngineConfig, progress: Progress) -> Iterator[FleetCluster]:
    import ray

    from cluster.fleet.autoscale import Autoscaler
    from cluster.join import connect_ray
    from cluster.launch import plan

    threads = own_threads(config)
    stack = ExitStack()
    try:
        owns_ray = connect_ray(config, config.ranks * threads, progress)
        if owns_ray:
            stack.callback(ray.shutdown)
        cluster = FleetCluster(config, plan(config, threads if owns_ray else 1))
        stack.callback(cluster.fleet.close)
        cluster.fleet.start(progress)
        if (autoscaler := Autoscaler.of(cluster.fleet)) is not None:
            stack.callback(autoscaler.close)
        yield cluster
    finally:
        with interrupts_held():
            stack.close()


def _serve_cluster(config: EngineConfig, app: str, progress: Progress) -> ServeCluster:
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from cluster.join import check_address

    address = config.ray_address or "auto"
    progress(f"joining the Ray cluster at {address}")
    check_address(address)
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
        return ServeCluster(serve.get_deployment_handle("Engine", app), app)
    except (RayServeException, KeyError, ConnectionError) as error:  # no Serve, no such application, no Ray
        raise ConfigError(f"no Manta application {app!r} on the Ray cluster at {address}: {error}") from error

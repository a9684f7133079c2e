"""How a service reaches its scheduler: in the same process, or through Ray Serve.

Imports the rest only when one is made.
"""

import asyncio
import time
from typing import TYPE_CHECKING, Any, Protocol

from cluster.config import EngineConfig
from cluster.engine import EngineError, EngineStats, OnDeltas, OnFailure, RequestStream
from scheduler.config.core import QueueBounds
from scheduler.server.stats import ClusterStatus

if TYPE_CHECKING:
    from cluster.local.engine import LocalEngine

ADDRESS_TIMEOUT_S = 30.0
STATUS_TIMEOUT_S = 5.0
ENGINE_PATIENCE_S = 1.0
"""Then the scheduler is asked: whoever asks for readiness does not wait for long (`service.READY_TIMEOUT_S`)."""


class Cluster(Protocol):
    """The scheduler as a replica reaches it."""

    def connect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> RequestStream:
        """A new stream to the scheduler that is up now; called from a thread. Errors: EngineError, OSError while there
        is none."""
        ...

    async def status(self, maps: bool = False) -> ClusterStatus:
        """The whole cluster at this moment; maps: with the state of every block. Never raises: what cannot be reached
        is reported as not ready."""
        ...


class LocalCluster:
    """A `Cluster` in this very process: an engine starts with each connection, and ends with the next one.

    bounds: of the queue; None: it has none.
    """

    def __init__(self, config: EngineConfig, bounds: QueueBounds | None = None) -> None:
        self._config = config
        self._bounds = bounds
        self._engine: LocalEngine | None = None
        self._progress: list[str] = []
        self._started_s = time.monotonic()

    def connect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> RequestStream:
        from cluster.local.engine import start_local

        if self._engine is not None:  # it is lost, and holds the memory of the next one
            self._engine.close()
        self._engine = start_local(self._config, on_deltas, on_failure, self._progress.append, self._bounds)
        return self._engine

    async def status(self, maps: bool = False) -> ClusterStatus:
        stats: EngineStats | None = self._engine.stats() if self._engine is not None else None
        up = stats is not None and any(group.up for group in stats.groups)
        phase = "starting" if stats is None else "ready" if up else "degraded"
        return ClusterStatus(
            phase=phase,
            model=self._config.model,
            revision=self._config.revision,
            block_size=self._config.block_size,
            progress=tuple(self._progress),
            engine=stats,
            tallies=self._engine.tallies.snapshot() if self._engine is not None else (),
            maps=self._engine.maps() if maps and self._engine is not None else (),
            uptime_s=time.monotonic() - self._started_s,
            busy_s=self._engine.busy_s if self._engine is not None else 0.0,
            front_ends=1,
            target_groups=self._config.groups,
        )


class ServeCluster:
    """A `Cluster` behind the `Engine` deployment. Requests go to the scheduler directly, and it is found by its name: it lives
    on while Serve replaces an `Engine` that has died.

    engine: a Serve deployment handle. application: its name. version: of the model that this front end speaks for; None:
    whichever is served when it connects.
    """

    def __init__(self, engine: Any, application: str, version: str | None = None) -> None:
        self._engine = engine
        self._application = application
        self._version = version
        self._asking: dict[bool, asyncio.Task[ClusterStatus]] = {}

    def connect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> RequestStream:
        import ray
        from ray.serve.exceptions import RayServeException

        from cluster.remote import SchedulerStream

        try:
            scheduler = self._scheduler()
            if scheduler is None:
                raise EngineError("there is no scheduler yet, or it is being replaced")
            handover = ray.get(scheduler.handover.remote(), timeout=ADDRESS_TIMEOUT_S)
        except (ray.exceptions.RayError, RayServeException, TimeoutError) as error:
            raise EngineError(f"nobody says where the scheduler listens: {error}") from error
        if handover is None:
            raise EngineError("the scheduler does not listen yet")
        return SchedulerStream(handover.host, handover.port, handover.token, on_deltas, on_failure)

    async def status(self, maps: bool = False) -> ClusterStatus:
        """Askers at the same time share one answer."""
        task = self._asking.get(maps)
        if task is None:
            task = self._asking[maps] = asyncio.create_task(self._ask(maps))
            task.add_done_callback(lambda _: self._asking.pop(maps, None))
        return await asyncio.shield(task)

    async def _ask(self, maps: bool) -> ClusterStatus:
        """The engine knows most. While it does not answer, the scheduler knows how the groups are."""
        engine = asyncio.create_task(self._of_engine(maps))
        await asyncio.wait((engine,), timeout=ENGINE_PATIENCE_S)
        if engine.done() and engine.exception() is None:
            return engine.result()
        asked = [engine, asyncio.create_task(self._of_scheduler(maps))]
        why: Exception | None = None
        try:
            for answer in asyncio.as_completed(asked, timeout=STATUS_TIMEOUT_S):
                try:
                    return await answer
                except Exception as error:  # a dead replica, a timeout: the other one may know
                    why = why or error
        finally:
            for each in asked:  # calls to who does not answer would gather until it does
                each.cancel()
        return ClusterStatus(phase="starting", progress=(f"the engine does not answer: {why}",))

    async def _of_engine(self, maps: bool) -> ClusterStatus:
        status: ClusterStatus | None = await self._engine.status.remote(maps, self._version)
        if status is None:
            raise EngineError(f"the engine does not serve version {self._version}")
        return status

    async def groups_are_up(self) -> bool:
        """Of this version, whatever else is served."""
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                return (await self._of_scheduler(False)).ready
        except Exception:  # there is no scheduler, or it does not answer
            return False

    async def _of_scheduler(self, maps: bool) -> ClusterStatus:
        """Errors: EngineError, Ray's."""
        scheduler = await asyncio.to_thread(self._scheduler)
        if scheduler is None:
            raise EngineError("there is no scheduler")
        status: ClusterStatus = await scheduler.status.remote(maps)
        return status

    def _scheduler(self) -> Any | None:
        """Its actor, if there is one. Errors: those of Serve, if it has to ask the engine which one is meant."""
        from cluster.fleet.estate import namespace_of
        from cluster.fleet.ownership.remains import latest_scheduler

        version = self._version or self._engine.version.remote().result(timeout_s=ADDRESS_TIMEOUT_S)
        return latest_scheduler(namespace_of(self._application), version)


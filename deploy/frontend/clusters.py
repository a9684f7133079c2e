"""How a service reaches its scheduler: in the same process, or through Ray Serve.

Imports the rest only when one is made.
"""

import asyncio
import time
from typing import TYPE_CHECKING, Any

from cluster.config import EngineConfig
from cluster.engine import EngineError, EngineStats, OnDeltas, OnFailure, RequestStream
from scheduler.server.stats import ClusterStatus

if TYPE_CHECKING:
    from cluster.local.engine import LocalEngine

ADDRESS_TIMEOUT_S = 30.0
STATUS_TIMEOUT_S = 5.0


class LocalCluster:
    """A `Cluster` in this very process: an engine starts with each connection, and ends with the next one."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._engine: LocalEngine | None = None
        self._progress: list[str] = []
        self._started_s = time.monotonic()

    def connect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> RequestStream:
        from cluster.local.engine import start_local

        if self._engine is not None:  # it is lost, and holds the memory of the next one
            self._engine.close()
        self._engine = start_local(self._config, on_deltas, on_failure, self._progress.append)
        return self._engine

    async def status(self, maps: bool = False) -> ClusterStatus:
        stats: EngineStats | None = self._engine.stats() if self._engine is not None else None
        up = stats is not None and any(group.up for group in stats.groups)
        phase = "starting" if stats is None else "ready" if up else "degraded"
        return ClusterStatus(
            phase=phase,
            model=self._config.model,
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
    """A `Cluster` behind the `Engine` deployment: it is asked where the scheduler is; requests then go there directly.

    engine: a Serve deployment handle.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._asking: dict[bool, asyncio.Task[ClusterStatus]] = {}

    def connect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> RequestStream:
        from cluster.remote import SchedulerStream

        try:
            address = self._engine.address.remote().result(timeout_s=ADDRESS_TIMEOUT_S)
        except Exception as error:  # Serve raises what the engine raised, and errors of its own
            raise EngineError(f"the engine does not say where its scheduler is: {error}") from error
        return SchedulerStream(address.host, address.port, address.token, on_deltas, on_failure)

    async def status(self, maps: bool = False) -> ClusterStatus:
        """Askers at the same time share one answer."""
        task = self._asking.get(maps)
        if task is None:
            task = self._asking[maps] = asyncio.create_task(self._ask(maps))
            task.add_done_callback(lambda _: self._asking.pop(maps, None))
        return await asyncio.shield(task)

    async def _ask(self, maps: bool) -> ClusterStatus:
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                status: ClusterStatus = await self._engine.status.remote(maps)
        except Exception as error:  # a dead replica, a timeout: either way nobody knows more
            return ClusterStatus(phase="starting", progress=(f"the engine does not answer: {error}",))
        return status

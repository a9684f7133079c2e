"""How a service reaches its scheduler: in the same process, or through Ray Serve.

Imports the rest only when one is made.
"""

import time
from typing import TYPE_CHECKING

from cluster.config import EngineConfig
from cluster.engine import Engine, EngineStats, OnDeltas, OnFailure
from scheduler.stats import ClusterStatus

if TYPE_CHECKING:
    from cluster.local import LocalEngine


class LocalCluster:
    """A `Cluster` in this very process: the engine starts with the first connection and ends with it."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._engine: LocalEngine | None = None
        self._progress: list[str] = []
        self._started_s = time.monotonic()

    def connect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> Engine:
        from cluster.local import start_local

        self._engine = start_local(self._config, on_deltas, on_failure, self._progress.append)
        return self._engine

    async def status(self, maps: bool = False) -> ClusterStatus:
        stats: EngineStats | None = self._engine.stats() if self._engine is not None else None
        up = stats is not None and any(group.up for group in stats.groups)
        phase = "starting" if stats is None else "ready" if up else "degraded"
        return ClusterStatus(
            phase=phase,
            model=self._config.model,
            page_size=self._config.block_size,
            progress=tuple(self._progress),
            engine=stats,
            tallies=self._engine.tallies.snapshot() if self._engine is not None else (),
            maps=self._engine.maps() if maps and self._engine is not None else (),
            uptime_s=time.monotonic() - self._started_s,
            front_ends=1,
            target_groups=self._config.groups,
        )

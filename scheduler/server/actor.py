"""The Ray shell of the scheduler: an asyncio actor that runs one `SchedulerServer`. Ray places, names and watches it.

Imports ray and `server`. Tokens and commands go over the server's socket; actor calls are for set-up, fencing and questions.
"""

import asyncio
import logging
import os
from typing import NamedTuple

import ray
from ray.util.placement_group import PlacementGroup, PlacementGroupID, placement_group_table, remove_placement_group

from kvcache.ids import GroupId
from scheduler.config.core import CoreConfig, QueueBounds, Resolved
from scheduler.core import SchedulerCore
from scheduler.logs import configure
from scheduler.placement import why
from scheduler.protocol.orphans import Estate, OwnerWatch
from scheduler.protocol.sentinel import watch_this_process
from scheduler.server.server import SchedulerServer
from scheduler.server.stats import ClusterStatus
from scheduler.server.vitals import Fenced

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0


class Handover(NamedTuple):
    """What whoever takes a scheduler over, or connects to it, must know. epochs: of each group the last that has been seen."""

    host: str
    port: int
    token: str
    epochs: dict[int, int]


class SchedulerSettings(NamedTuple):
    """What a scheduler was told: the whole configuration of its cluster, of which its types let it see its own part."""

    config: CoreConfig
    resolved: Resolved
    bounds: QueueBounds | None
    log_format: str


class SchedulerActor:
    """Wrapped by `ray.remote` where it is placed (`cluster.launch`). Every method runs on the actor's one event loop.

    estate: what it belongs to if it outlives whoever started it.
    """

    def __init__(
        self,
        config: CoreConfig,
        resolved: Resolved,
        bounds: QueueBounds | None,
        token: str,
        log_format: str,
        estate: Estate | None = None,
    ) -> None:
        configure(log_format, role="scheduler")
        watch_this_process()
        if config.log_decisions:
            why.show()
        self._told = SchedulerSettings(config, resolved, bounds, log_format)
        self._core = SchedulerCore(config, resolved, bounds)
        self._closed = asyncio.Event()
        self._token = token
        self._port: int | None = None
        self._estate = estate
        self._owner = OwnerWatch(estate.adoption_timeout_s, self._orphaned) if estate is not None else None
        used = self._owner.heard if self._owner is not None else lambda: None
        self._server = SchedulerServer(self._core, token, check_invariants=config.check_invariants, used=used)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def listen(self) -> tuple[str, int]:
        """Opens the socket; returns where leaders and front ends connect."""
        self._loop = asyncio.get_running_loop()
        host = ray.util.get_node_ip_address()
        self._port = await self._server.listen(host)
        return host, self._port

    async def handover(self) -> Handover | None:
        """None: it does not listen yet."""
        if self._port is None:
            return None
        epochs = {int(group): epoch for group, epoch in self._core.epochs.items()}
        return Handover(ray.util.get_node_ip_address(), self._port, self._token, epochs)

    async def told(self) -> SchedulerSettings:
        """For whoever is to keep it and its groups, and was told something else himself."""
        return self._told

    async def keep(self) -> None:
        """An owner lives."""
        if self._owner is not None:
            self._owner.heard()

    async def expect(self, group: int) -> None:
        """A group is being started: requests wait for it."""
        self._server.call(lambda core: core.expect(GroupId(group)))

    async def group_lost(self, group: int, reason: str, back_s: float | None = None) -> None:
        """The group is tried again only in `back_s`; None: it will not come back, and what only it could serve fails with
        `reason`."""
        self._server.group_lost(GroupId(group), reason, back_s)

    async def drain(self, group: int, returning: bool) -> bool:
        """The group takes no more sequences; False if it is needed. returning: it comes back, so that requests wait for it."""
        return self._server.call(lambda core: core.drain(GroupId(group), returning=returning))

    async def vacate(self, group: int) -> None:
        """What still runs in a draining group starts again elsewhere."""
        self._server.call(lambda core: core.vacate(GroupId(group)))

    async def beat(self) -> tuple[Fenced, ...]:
        """This process lives. The epochs that it has stopped listening to, of each group the last: whoever keeps the group ends
        what is left of them."""
        return tuple(self._server.fenced.values())

    async def status(self, maps: bool = False) -> ClusterStatus:
        return self._server.status(maps=maps)

    async def check(self) -> None:
        """Checks every invariant now. Errors: AssertionError that names the rule."""
        self._core.check()

    async def closed(self) -> None:
        """Returns when `close` was called, so that whoever waits for it hears of an unexpected end as an error."""
        await self._closed.wait()

    async def close(self) -> None:
        self._closed.set()
        await self._server.close()

    def _orphaned(self) -> None:
        """From the watch's thread: ends every group's log, frees their places, and ends this process."""
        assert self._estate is not None
        logger.error("nobody has taken this scheduler over: it ends, and its groups with it")
        try:
            if self._loop is not None:
                asyncio.run_coroutine_threadsafe(self.close(), self._loop).result(CLOSE_TIMEOUT_S)
            for number, placement in placement_group_table().items():
                if placement["name"].startswith(self._estate.prefix) and placement["state"] != "REMOVED":
                    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(number))))
        except Exception:
            logger.exception("not all could be ended")
        os._exit(1)

"""One look a second at the cluster of each model, shared by everyone who watches.

The history is always kept, watched or not: a page is opened when something has just happened, and should show it. That costs
one small status call a second. The maps, which grow with the pools, are only asked for while somebody watches.
"""

import asyncio
import contextlib
import gzip
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec

from deploy.frontend.models.further import FurtherModel, FurtherModels
from deploy.frontend.service.service import Service
from deploy.status.document import ExpertsLine, GroupLine, Sample, StatusDocument, Totals
from deploy.status.history import History
from deploy.status.maps import blocks_per_cell, pack, thin
from scheduler.server.stats import ClusterStatus, GroupStats, PoolMap

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
WATCHED_S = 5.0
"""How long after the last viewer the maps are still asked for."""

STATUS_TIMEOUT_S = 5.0


class StatusAnswer:
    """One status, as JSON. Each form is made once, when the first viewer asks for it."""

    def __init__(self, document: StatusDocument, taken_s: float, has_maps: bool) -> None:
        self.taken_s = taken_s
        self.has_maps = has_maps
        self._document = document
        self._bodies: dict[tuple[bool, bool], bytes] = {}

    def body(self, *, history: bool, compressed: bool) -> bytes:
        if (body := self._bodies.get((history, compressed))) is None:
            if compressed:
                body = gzip.compress(self.body(history=history, compressed=False), compresslevel=1, mtime=0)
            else:
                body = msgspec.json.encode(self._document if history else msgspec.structs.replace(self._document, history=()))
            self._bodies[history, compressed] = body
        return body


class Watches:
    """A watch for each model of an endpoint, from the moment that it is there."""

    def __init__(self, first: Service, further: FurtherModels) -> None:
        self._first = StatusWatch(first, History(), self._names)
        self._first_name = first.model.name
        self._further = further

    def of(self, model: str | None) -> "StatusWatch | None":
        """model: its name; None: the first one. Returns None if there is no such model."""
        if (found := self._further.get(model)) is not None:
            return found.once(self._watch)
        return self._first if model in (None, self._first_name) else None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Each takes a sample a second; that of a model which has come within a second, too."""
        tasks = {self._first: asyncio.create_task(self._first.run())}
        following = asyncio.create_task(self._follow(tasks))
        try:
            yield
        finally:
            for task in (following, *tasks.values()):
                task.cancel()
            await asyncio.gather(following, *tasks.values(), return_exceptions=True)

    async def _follow(self, tasks: "dict[StatusWatch, asyncio.Task[None]]") -> None:
        while True:
            watches = {self._first, *(model.once(self._watch) for model in self._further)}
            tasks |= {watch: asyncio.create_task(watch.run()) for watch in watches - tasks.keys()}
            for gone in tasks.keys() - watches:
                tasks.pop(gone).cancel()
            await asyncio.sleep(PERIOD_S)

    def _watch(self, model: FurtherModel) -> "StatusWatch":
        return StatusWatch(model.service, History(), self._names)

    def _names(self) -> tuple[str, ...]:
        return (self._first_name, *(each.name for each in self._further))


class StatusWatch:
    """Samples the cluster of one service; its methods belong to the service's event loop. names: of all models of the endpoint,
    at this moment."""

    def __init__(self, service: Service, history: History, names: Callable[[], tuple[str, ...]]) -> None:
        self._service = service
        self._history = history
        self._names = names
        self._answer: StatusAnswer | None = None
        self._wanted_s = -WATCHED_S
        self._looking = asyncio.Lock()

    async def run(self) -> None:
        """Takes a sample a second until cancelled."""
        while True:
            began_s = time.monotonic()
            async with self._looking:
                await self._look()
            await asyncio.sleep(max(0.0, began_s + PERIOD_S - time.monotonic()))

    async def latest(self) -> StatusAnswer:
        """The newest answer with maps; taken now if there is none, or if `run` is not running."""
        self._wanted_s = time.monotonic()
        async with self._looking:
            if self._answer is None or not self._answer.has_maps or time.monotonic() - self._answer.taken_s > 2 * PERIOD_S:
                return await self._look()
            return self._answer

    async def _look(self) -> StatusAnswer:
        maps = time.monotonic() - self._wanted_s < WATCHED_S
        status, now_s = await self._status(maps), time.monotonic()
        self._history.observe(status, time.time(), now_s)
        self._answer = StatusAnswer(self._describe(status), now_s, maps)
        return self._answer

    async def _status(self, maps: bool) -> ClusterStatus:
        """A status call that fails is itself a status: the page must outlive whatever it watches."""
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                return await self._service.cluster.status(maps=maps)
        except Exception as error:
            logger.debug("no status", exc_info=True)
            return ClusterStatus(phase="unreachable", progress=(f"no status: {error or type(error).__name__}",))

    def _describe(self, status: ClusterStatus) -> StatusDocument:
        engine, samples = status.engine, tuple(self._history.samples)
        blocks = blocks_per_cell(status.maps)
        return StatusDocument(
            phase=status.phase,
            connected=self._service.connected,
            model=self._service.model.name,
            models=self._names(),
            block_size=status.block_size,
            progress=status.progress,
            starting=status.starting,
            uptime_s=round(status.uptime_s, 1),
            front_ends=status.front_ends,
            target_groups=status.target_groups,
            oldest_wait_s=round(engine.oldest_wait_s, 2) if engine is not None else 0.0,
            waiting_tokens=engine.waiting_tokens if engine is not None else 0,
            totals=msgspec.convert(engine, Totals, from_attributes=True) if engine is not None else Totals(),
            blocks_per_cell=blocks,
            groups=tuple(self._line(g, status.maps, blocks) for g in engine.groups) if engine is not None else (),
            now=samples[-1] if samples else Sample(t=time.time()),
            history=samples[:-1],
        )

    def _line(self, group: GroupStats, maps: Sequence[PoolMap], blocks: int) -> GroupLine:
        states = next((pool.states for pool in maps if pool.group == group.group), None)
        step_ms, step_tokens = self._history.step(group)
        return GroupLine(
            group=group.group,
            state="down" if not group.up else "draining" if group.draining else "up",
            total=group.total_blocks,
            free=group.free_blocks,
            held=group.held_blocks - group.shared_blocks,
            shared=group.shared_blocks,
            cached=group.cached_blocks,
            running=group.running,
            starved=group.starved,
            backlog_tokens=group.backlog_tokens,
            evictions=group.evictions,
            step_ms=None if step_ms is None else round(step_ms, 3),
            step_tokens=None if step_tokens is None else round(step_tokens, 1),
            map=None if states is None else pack(thin(states, blocks)),
            epoch=group.epoch,
            experts=_experts(group),
        )


def _experts(group: GroupStats) -> ExpertsLine | None:
    if not group.expert_imbalance:
        return None
    most, layer, expert = max(zip(group.expert_imbalance, group.expert_layers, group.expert_busiest, strict=True))
    mean = sum(group.expert_imbalance) / len(group.expert_imbalance)
    return ExpertsLine(len(group.expert_imbalance), round(mean, 2), round(most, 2), layer, expert)

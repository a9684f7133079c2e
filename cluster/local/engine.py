"""An engine without Ray: the same core under a lock, which stands in for the scheduler actor's event loop, and groups.

On CPUs the ranks are threads of this process (`groups`): for debugging and fast tests. On a GPU a step takes a
millisecond, which the front end's work must not lengthen: there the groups have a process of their own (`process`).
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from cluster.config import EngineConfig, own_threads
from cluster.engine import EngineError, EngineLost, EngineStats, OnDeltas, OnFailure, Progress
from cluster.local.groups import EPOCH, LocalGroups, ThreadGroups
from cluster.local.process import ProcessGroups
from cluster.resolve import resolve
from kvcache.ids import GroupId
from kvcache.layout import PoolSizes
from scheduler.config.core import QueueBounds, Resolved
from scheduler.core import SchedulerCore
from scheduler.placement import why
from scheduler.protocol.leaders import Commands, FromLeader, Moved
from scheduler.protocol.messages import Abort, Deltas, FromFrontEnd, Request, Stop, Submit, TalliedMetric, Tally
from scheduler.server.shell import Shell
from scheduler.server.stats import PoolMap, pool_maps, snapshot
from scheduler.server.tallies import Tallies

logger = logging.getLogger(__name__)

FRONT_END = 0
T = TypeVar("T")


def start_local(
    config: EngineConfig, on_deltas: OnDeltas, on_failure: OnFailure, progress: Progress, bounds: QueueBounds | None = None
) -> "LocalEngine":
    """See `cluster.engine.StartEngine`. bounds: of the queue; None: it has none."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    resolved = resolve(config, device, own_threads(config))
    if config.log_decisions:
        why.show()
    groups = ProcessGroups(config, resolved, config.hung_after_s) if device == "cuda" else ThreadGroups(config, resolved)
    engine = LocalEngine(config, resolved, groups, on_deltas, on_failure, bounds)
    try:
        engine.start(progress)
    except BaseException:
        engine.close()
        raise
    return engine


class LocalEngine:
    """The `Engine` without Ray. groups: not started yet.

    All calls into the core hold the lock; what it hands out is delivered before release, so orders are kept.
    """

    def __init__(
        self,
        config: EngineConfig,
        resolved: Resolved,
        groups: LocalGroups,
        on_deltas: OnDeltas,
        on_failure: OnFailure,
        bounds: QueueBounds | None = None,
    ) -> None:
        self.block_size = config.block_size
        self._config = config
        self._core = SchedulerCore(config, resolved, bounds)
        self._shell = Shell(
            self._core, self._tell_group, self._tell_front_end, check_invariants=config.check_invariants
        )
        self._groups = groups
        self._on_deltas = on_deltas
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._closed = False

    # ---- Engine

    def submit(self, requests: Sequence[Request]) -> None:
        if self._failure is not None or self._closed:
            raise EngineError(self._failure or "the engine was shut down")
        self._take(Submit(tuple(requests)))

    def abort(self, streams: Sequence[int]) -> None:
        self._take(Abort(tuple(streams)))

    def stop(self, stream: int, keep_tokens: int) -> None:
        self._take(Stop(stream, keep_tokens))

    def tally(self, metrics: Sequence[TalliedMetric]) -> None:
        if self._failure is not None or self._closed:
            raise EngineError(self._failure or "the engine was shut down")
        self._take(Tally(tuple(metrics)))

    def leave(self) -> None:
        if self._failure is None and not self._closed:
            self.call(lambda core: core.front_end_down(FRONT_END))

    def reconnect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> None:
        """Errors: EngineLost: groups that are lost in this process are lost for good."""
        with self._lock:
            if self._failure is not None or self._closed:
                raise EngineLost(self._failure or "the engine was shut down")
            self._on_deltas, self._on_failure = on_deltas, on_failure

    @property
    def tallies(self) -> Tallies:
        return self._shell.tallies

    @property
    def busy_s(self) -> float:
        """Of the core: what requests and reports have cost, as the scheduler actor counts it; looks do not count."""
        return self._shell.busy_s

    def stats(self) -> EngineStats:
        with self._lock:
            self._core.now_s = time.monotonic()
            return snapshot(self._core)

    def maps(self) -> tuple[PoolMap, ...]:
        """The state of every block."""
        with self._lock:
            return pool_maps(self._core)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._groups.close()

    # ---- groups

    def start(self, progress: Progress) -> None:
        """Returns when all ranks are ready. Errors: the first rank's error."""
        for number in range(self._config.groups):
            self._core.expect(GroupId(number))
        self._groups.start(self, progress)
        progress(f"{self._config.groups} group(s) are ready")

    def group_up(self, group: GroupId, sizes: PoolSizes, host: PoolSizes, ports: tuple[str, ...]) -> None:
        rows = self._config.max_num_seqs
        self.call(
            lambda core: core.group_up(
                group, EPOCH, sizes.blocks, rows, host_blocks=host.blocks, ports=ports, narrow_blocks=sizes.narrow,
                host_narrow_blocks=host.narrow,
            )
        )

    def group_lost(self, group: GroupId, reason: str) -> None:
        with self._lock:
            if self._closed:
                return
            self._shell.call(lambda core: core.group_down(group, reason))
            lost = not self._core.groups
            if lost:
                self._failure = reason
        if lost:
            self._on_failure(reason)

    def hear(self, group: GroupId, message: FromLeader) -> None:
        with self._lock:
            if not (self._closed and isinstance(message, Moved)):  # there is nothing more to start
                self._shell.leader_says(group, message)

    # ---- the shell's

    def call(self, change: Callable[[SchedulerCore], T]) -> T:
        with self._lock:
            return self._shell.call(change)

    def _take(self, message: FromFrontEnd) -> None:
        with self._lock:
            self._shell.front_end_says(FRONT_END, message)

    def _tell_group(self, group: GroupId, commands: Commands) -> None:
        self._groups.command(group, commands.commands)

    def _tell_front_end(self, _: int, deltas: Deltas) -> None:
        """A front end that raises has missed these, and will see it by their positions; its groups go on."""
        try:
            self._on_deltas(deltas)
        except Exception:
            logger.exception("the front end did not take what it was told")

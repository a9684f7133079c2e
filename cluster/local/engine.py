"""An engine without Ray: the same core under a lock, which stands in for the scheduler actor's event loop, and groups.

On CPUs the ranks are threads of this process (`local_groups`): for debugging and fast tests. On a GPU a step takes a
millisecond, which the front end's work must not lengthen: there the groups have a process of their own (`local_process`).
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence

import torch

from cluster.config import EngineConfig, own_threads
from cluster.engine import EngineError, EngineStats, OnDeltas, OnFailure, Progress
from cluster.local.groups import EPOCH, Groups, ThreadGroups
from cluster.local.process import ProcessGroups
from cluster.resolve import resolve
from kvcache.ids import GroupId
from scheduler.config import Resolved
from scheduler.core import SchedulerCore
from scheduler.invariants import check
from scheduler.placement import why
from scheduler.protocol.messages import Deltas, Moved, Report, Request, TalliedMetric
from scheduler.queue.limits import RequestRefused
from scheduler.server.delivery import refuse
from scheduler.server.stats import PoolMap, pool_maps, snapshot
from scheduler.server.tallies import Tallies

logger = logging.getLogger(__name__)

FRONT_END = 0


def start_local(config: EngineConfig, on_deltas: OnDeltas, on_failure: OnFailure, progress: Progress) -> "LocalEngine":
    """See `cluster.engine.StartEngine`."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    resolved = resolve(config, device, own_threads(config))
    if config.log_decisions:
        why.show()
    make = ProcessGroups if device == "cuda" else ThreadGroups
    engine = LocalEngine(config, resolved, make(config, resolved), on_deltas, on_failure)
    try:
        engine.start(progress)
    except BaseException:
        engine.close()
        raise
    return engine


class LocalEngine:
    """The `Engine` without Ray. groups: not started yet.

    All calls into the core hold the lock; what it hands out is delivered before release.
    """

    def __init__(
        self,
        config: EngineConfig,
        resolved: Resolved,
        groups: Groups,
        on_deltas: OnDeltas,
        on_failure: OnFailure,
    ) -> None:
        self.block_size = config.block_size
        self.tallies = Tallies()
        self.busy_s = 0.0
        """Of the core: what requests and reports have cost, as the scheduler actor counts it; looks do not count."""
        self._config = config
        self._core = SchedulerCore(config, resolved)
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
        with self._event() as core:
            for request in requests:
                try:
                    core.submit(FRONT_END, request)
                except RequestRefused as refusal:
                    self._tell(refuse(request, refusal))

    def abort(self, streams: Sequence[int]) -> None:
        with self._event() as core:
            for stream in streams:
                core.abort(FRONT_END, stream)

    def stop(self, stream: int, keep_tokens: int) -> None:
        with self._event() as core:
            core.end(FRONT_END, stream, keep_tokens)

    def tally(self, metrics: Sequence[TalliedMetric]) -> None:
        if self._failure is not None or self._closed:
            raise EngineError(self._failure or "the engine was shut down")
        with self._lock:
            self.tallies.add(metrics)

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

    def group_up(self, group: GroupId, blocks: int, host_blocks: int, ports: tuple[str, ...]) -> None:
        with self._event() as core:
            core.group_up(group, EPOCH, blocks, self._config.max_num_seqs, host_blocks=host_blocks, ports=ports)

    def group_lost(self, group: GroupId, reason: str) -> None:
        with self._event() as core:
            if self._closed:
                return
            core.group_down(group, reason)
            lost = not core.groups
            if lost:
                self._failure = reason
        if lost:
            self._on_failure(reason)

    def report(self, group: GroupId, report: Report) -> None:
        with self._event() as core:
            core.report(group, report)

    def moved(self, group: GroupId, moved: Moved) -> None:
        with self._event() as core:
            if not self._closed:
                core.moved(group, moved)

    @contextlib.contextmanager
    def _event(self) -> Iterator[SchedulerCore]:
        """One call into the core; what follows from it is delivered before the lock is released, so orders are kept."""
        with self._lock:
            began_s = self._core.now_s = time.monotonic()
            try:
                yield self._core
            finally:  # what was committed before an error is told all the same
                self._deliver()
                self.busy_s += time.monotonic() - began_s

    def _deliver(self) -> None:
        if self._config.check_invariants:
            check(self._core)
        for name, batch in self._core.take_logs():
            self._groups.command(name, batch.commands)
        for _, deltas in self._core.outbox.drain():
            self._tell(deltas)

    def _tell(self, deltas: Deltas) -> None:
        """A front end that raises has missed these, and will see it by their positions; its groups go on."""
        try:
            self._on_deltas(deltas)
        except Exception:
            logger.exception("the front end did not take what it was told")

"""Everything in this one process: the same core, the same step loop, ranks as threads. For debugging and fast tests; no Ray.

A lock stands in for the scheduler actor's event loop, queues for its sockets.
"""

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from cluster.config import EngineConfig
from cluster.engine import EngineError, EngineStats, OnDeltas, OnFailure, Progress
from cluster.worker_config import resolve
from kvcache.ids import GroupId
from scheduler import why
from scheduler.config import CoreConfig
from scheduler.core import SchedulerCore
from scheduler.delivery import refuse
from scheduler.invariants import check
from scheduler.limits import RequestRefused
from scheduler.messages import Command, End, Moved, Report, Request, TalliedMetric
from scheduler.stats import PoolMap, pool_maps, snapshot
from scheduler.tallies import Tallies
from workers.build import Built, build_rank
from workers.config import WorkerConfig
from workers.loop.leader import Gathered, LinkClosed, follow, lead
from workers.loop.rank import Rank
from workers.loop.reports import Reporter
from workers.moving.exchange import Exchange, LocalTransport
from workers.moving.mover import PageMover
from workers.parallel.connect import PeerLost
from workers.parallel.in_process import ThreadGroup

logger = logging.getLogger(__name__)

FRONT_END = 0
EPOCH = 0
CLOSE_TIMEOUT_S = 30.0


def start_local(config: EngineConfig, on_deltas: OnDeltas, on_failure: OnFailure, progress: Progress) -> "LocalEngine":
    """See `cluster.engine.StartEngine`."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    ranks = config.groups * config.tensor_parallel_size
    core, worker = resolve(config, device, ranks, max(1, (os.cpu_count() or 1) // ranks))
    if core.log_decisions:
        why.show()
    engine = LocalEngine(core, worker, on_deltas, on_failure, check_invariants=config.check_invariants)
    try:
        engine.start(config.groups, config.tensor_parallel_size, progress)
    except BaseException:
        engine.close()
        raise
    return engine


class LocalEngine:
    """The `Engine` of one process. All calls into the core hold the lock; what it hands out is delivered before release."""

    def __init__(
        self,
        core: CoreConfig,
        worker: WorkerConfig,
        on_deltas: OnDeltas,
        on_failure: OnFailure,
        *,
        check_invariants: bool = False,
    ) -> None:
        self.page_size = core.page_size
        self.tallies = Tallies()
        self.exchange = Exchange()
        self._core = SchedulerCore(core)
        self._worker = worker
        self._on_deltas = on_deltas
        self._on_failure = on_failure
        self._check = check_invariants
        self._lock = threading.Lock()
        self._inboxes: dict[GroupId, LocalLink] = {}
        self._threads: list[threading.Thread] = []
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
                    self._on_deltas(refuse(request, refusal))

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
        with self._event() as core:
            return snapshot(core)

    def maps(self) -> tuple[PoolMap, ...]:
        """The state of every block."""
        with self._event() as core:
            return pool_maps(core)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for link in self._inboxes.values():
                link.commands.put([End("the engine was shut down")])
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=CLOSE_TIMEOUT_S)

    # ---- groups

    def start(self, groups: int, size: int, progress: Progress) -> None:
        """Builds every rank in a thread of its own; returns when all are ready. Errors: the first rank's error."""
        starts = []
        for number in range(groups):
            group = GroupId(number)
            self._core.expect(group)
            link = self._inboxes[group] = LocalLink(self, group)
            starts.append(_GroupStart(self, group, link, size))
        for start in starts:
            progress(f"group {start.group}: loading {self._worker.model}")
            self._threads += start.threads()
        for start in starts:
            start.wait()
        progress(f"{groups} group(s) of {size} rank(s) are ready")

    def group_up(self, group: GroupId, built: Built, ports: tuple[str, ...]) -> None:
        with self._event() as core:
            core.group_up(group, EPOCH, built.pages, self._worker.rows, slots=built.slots, ports=ports)

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
            self._core.now_s = time.monotonic()
            yield self._core
            self._deliver()

    def _deliver(self) -> None:
        if self._check:
            check(self._core)
        for name, batch in self._core.take_logs():
            self._inboxes[name].commands.put(list(batch.commands))
        for _, deltas in self._core.outbox.drain():
            self._on_deltas(deltas)

    @property
    def worker(self) -> WorkerConfig:
        return self._worker


class LocalLink:
    """The leader's `SchedulerLink`: a queue down, a call up."""

    def __init__(self, engine: LocalEngine, group: GroupId) -> None:
        self.commands: queue.SimpleQueue[list[Command]] = queue.SimpleQueue()
        self._engine = engine
        self._group = group

    def receive(self, *, wait: bool) -> list[Command]:
        received = self.commands.get() if wait else []
        while not self.commands.empty():
            received += self.commands.get()
        return received

    def send(self, message: Report | Moved) -> None:
        if isinstance(message, Moved):
            self._engine.moved(self._group, message)
        else:
            self._engine.report(self._group, message)


class LocalFeed:
    """The leader's `PeerFeed` and, as `LocalInbox`, each peer's `PeerInbox`."""

    def __init__(self, peers: int) -> None:
        self.inboxes = [LocalInbox() for _ in range(peers)]

    def send(self, commands: Sequence[Command]) -> None:
        for inbox in self.inboxes:
            inbox.turns.put(commands)

    def close(self) -> None:
        for inbox in self.inboxes:
            inbox.turns.put(None)


class LocalInbox:
    def __init__(self) -> None:
        self.turns: queue.SimpleQueue[Sequence[Command] | None] = queue.SimpleQueue()

    def receive(self) -> Sequence[Command]:
        commands = self.turns.get()
        if commands is None:
            raise LinkClosed("the leader has gone")
        return commands


class _GroupStart:
    """The threads of one group: build, say ready, run. Any rank's error ends all of them."""

    def __init__(self, engine: LocalEngine, group: GroupId, link: LocalLink, size: int) -> None:
        self.group = group
        self._engine = engine
        self._link = link
        self._comms = ThreadGroup.create(size)
        self._feed = LocalFeed(size - 1)
        self._gathered = Gathered(size)
        self._gathered.send = link.send
        self._ready = [threading.Event() for _ in range(size)]
        self._error: BaseException | None = None

    def threads(self) -> list[threading.Thread]:
        threads = []
        for number in range(len(self._comms)):
            name = f"manta-group{self.group}-rank{number}"
            threads.append(threading.Thread(target=self._run, args=(number,), name=name, daemon=True))
            threads[-1].start()
        return threads

    def wait(self) -> None:
        for ready in self._ready:
            ready.wait()
        if self._error is not None:
            raise self._error

    def _run(self, number: int) -> None:
        loop: Callable[[Rank], str] = self._lead if number == 0 else lambda rank: follow(rank, self._feed.inboxes[number - 1])
        try:
            built = build_rank(self._engine.worker, self._comms[number])
            with contextlib.closing(built.rank):
                self._attach_mover(number, built)
                if number == 0:
                    self._engine.group_up(self.group, built, self._ports())
                self._ready[number].set()
                loop(built.rank)
        except BaseException as error:
            self._fail(number, error)

    def _attach_mover(self, number: int, built: Built) -> None:
        """What the rank says of a transfer goes straight to the leader's side: they share the process."""
        transport = None
        if self._engine.worker.transfers:
            transport = LocalTransport(self._engine.exchange, built.pool, group=self.group, epoch=EPOCH, rank=number)
        built.rank.mover = PageMover(built.pool, built.host, transport, self._gathered.add, rank=number, epoch=EPOCH)

    def _ports(self) -> tuple[str, ...]:
        """In one process a rank is found by its number: there is no port."""
        return tuple(f"local:{number}" for number in range(len(self._comms))) if self._engine.worker.transfers else ()

    def _lead(self, rank: Rank) -> str:
        return lead(rank, self._link, self._feed, Reporter(EPOCH, self._engine.worker.report_steps))

    def _fail(self, number: int, error: BaseException) -> None:
        """The first error is the cause; what the other ranks see afterwards is its consequence."""
        starting = not self._ready[number].is_set()
        if self._error is None and not isinstance(error, PeerLost | LinkClosed):
            self._error = error
            if not starting:
                logger.error("group %d, rank %d failed", self.group, number, exc_info=error)
        for comm in self._comms:
            comm.abort(f"rank {number} failed: {error}")
        self._feed.close()
        for ready in self._ready:
            ready.set()
        if not starting and not isinstance(error, PeerLost | LinkClosed):
            self._engine.group_lost(self.group, f"group {self.group}, rank {number}: {error}")

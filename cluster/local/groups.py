"""The groups of one process: every rank is a thread with the step loop that it has on Ray; queues stand in for sockets.

What holds the scheduler (`GroupHost`) is told what the groups have done, from their threads. Imports the workers; no Ray.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from kvcache.ids import GroupId
from kvcache.layout import PoolSizes
from scheduler.protocol.leaders import Command, End, FromLeader
from workers.config import ResolvedWorker, WorkerConfig
from workers.loop.adapters import GatheredReads
from workers.loop.leader import Gathered, LinkClosed, come, follow, lead
from workers.loop.pulse import Heart
from workers.loop.reports import Reporter
from workers.model.sources.files import Need
from workers.model.sources.find import find_checkpoint
from workers.model.sources.progress import DOWNLOADING, in_words
from workers.moving.exchange import Exchange, LocalTransport
from workers.moving.mover import BlockMover
from workers.parallel.connect import PeerLost
from workers.parallel.in_process import ThreadGroup
from workers.process.build import Built, build_rank

logger = logging.getLogger(__name__)

EPOCH = 0
CLOSE_TIMEOUT_S = 5.0


class GroupHost(Protocol):
    """Who hears of the groups. Every method may be called from any thread."""

    def group_up(self, group: GroupId, sizes: PoolSizes, host: PoolSizes, ports: tuple[str, ...]) -> None:
        """The group's ranks are built; commands may follow. host: in host memory. ports: where blocks are fetched."""
        ...

    def hear(self, group: GroupId, message: FromLeader) -> None: ...

    def group_lost(self, group: GroupId, reason: str) -> None:
        """A group that was up has failed; nothing more comes from it."""
        ...


class LocalGroups(Protocol):
    """Groups that run somewhere, in these threads or in a process of their own."""

    def start(self, host: GroupHost, progress: Callable[[str], None]) -> None:
        """Builds every rank; returns when all are ready. Errors: the first rank's error."""
        ...

    def command(self, group: GroupId, commands: Sequence[Command]) -> None:
        """The next part of the group's log. Must not wait."""
        ...

    def close(self) -> None:
        """Ends all groups and waits until they have gone."""
        ...


class ThreadGroups:
    """Every rank is a thread of this process."""

    def __init__(self, config: WorkerConfig, resolved: ResolvedWorker) -> None:
        self.config, self.resolved = config, resolved
        self.exchange = Exchange()
        self._links = {GroupId(number): LocalLink(GroupId(number)) for number in range(config.groups)}
        self._threads: list[threading.Thread] = []

    def start(self, host: GroupHost, progress: Callable[[str], None]) -> None:
        find_checkpoint(self.config, Need.WEIGHTS, in_words(progress, f"{DOWNLOADING} {self.config.model}"))
        starts = []
        for group, link in self._links.items():
            link.host = host
            starts.append(_GroupStart(self, host, group, link))
        for start in starts:
            progress(f"group {start.group}: loading {self.config.model}")
            self._threads += start.threads()
        for start in starts:
            start.wait()

    def command(self, group: GroupId, commands: Sequence[Command]) -> None:
        self._links[group].commands.put(list(commands))

    def close(self) -> None:
        for link in self._links.values():
            link.commands.put([End("the engine was shut down")])
        deadline_s = time.monotonic() + CLOSE_TIMEOUT_S  # of all; one that is in a long step ends with the process
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=max(0.0, deadline_s - time.monotonic()))


class LocalLink:
    """The leader's `SchedulerLink`: a queue down, a call up."""

    def __init__(self, group: GroupId) -> None:
        self.commands: queue.SimpleQueue[list[Command]] = queue.SimpleQueue()
        self.host: GroupHost | None = None
        self._group = group

    def receive(self, *, wait_s: float) -> list[Command]:
        return [command for commands in come(self.commands, wait_s) for command in commands]

    def send(self, message: FromLeader) -> None:
        assert self.host is not None, "sent before the start"
        self.host.hear(self._group, message)

    def wake(self) -> None:
        self.commands.put([])


class LocalFeed:
    """The leader's `PeerFeed` and, as `LocalInbox`, each peer's `PeerInbox`."""

    def __init__(self, peers: int) -> None:
        self.inboxes = [LocalInbox() for _ in range(peers)]

    def send(self, commands: Sequence[Command], held: Sequence[int]) -> None:
        for inbox in self.inboxes:
            inbox.turns.put((commands, held))

    def close(self) -> None:
        for inbox in self.inboxes:
            inbox.turns.put(None)


class LocalInbox:
    def __init__(self) -> None:
        self.turns: queue.SimpleQueue[tuple[Sequence[Command], Sequence[int]] | None] = queue.SimpleQueue()

    def receive(self) -> tuple[Sequence[Command], Sequence[int]]:
        turn = self.turns.get()
        if turn is None:
            raise LinkClosed("the leader has gone")
        return turn


class _GroupStart:
    """The threads of one group: build, say ready, run. Any rank's error ends all of them."""

    def __init__(self, groups: ThreadGroups, host: GroupHost, group: GroupId, link: LocalLink) -> None:
        size = groups.config.tensor_parallel_size
        self.group = group
        self._groups = groups
        self._host = host
        self._link = link
        self._comms = ThreadGroup.create(size)
        self._feed = LocalFeed(size - 1)
        self._gathered = Gathered(size)
        self._gathered.send = link.send
        self._reads = GatheredReads(size)
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
        try:
            built = build_rank(self._groups.config, self._groups.resolved, self._comms[number])
            with contextlib.closing(built.rank):
                self._attach_mover(number, built)
                if built.rank.adapters is not None:
                    built.rank.adapters.on_read = self._reads.add
                if number == 0:
                    self._host.group_up(self.group, built.sizes, built.host_sizes, self._ports())
                self._ready[number].set()
                if number == 0:
                    self._lead(built)
                else:
                    follow(built.rank, self._feed.inboxes[number - 1])
        except BaseException as error:
            self._fail(number, error)

    def _attach_mover(self, number: int, built: Built) -> None:
        """What the rank says of a transfer goes straight to the leader's side: they share the process."""
        transport = None
        if self._groups.config.exchanges_blocks:
            transport = LocalTransport(self._groups.exchange, group=self.group, epoch=EPOCH, rank=number)
        built.rank.mover = BlockMover(
            built.pool, built.host, transport, self._gathered.add, rank=number, epoch=EPOCH, narrow=built.narrow
        )

    def _ports(self) -> tuple[str, ...]:
        """In one process a rank is found by its number: there is no port."""
        return tuple(f"local:{number}" for number in range(len(self._comms))) if self._groups.config.exchanges_blocks else ()

    def _lead(self, built: Built) -> str:
        resolved = self._groups.resolved
        reporter = Reporter(EPOCH, resolved.report_steps, hold_s=resolved.report_hold_s, expert_load=built.expert_load)
        heart = Heart(EPOCH, self._link.send, built.rank.pulse)
        try:
            return lead(built.rank, self._link, self._feed, reporter, self._reads if built.rank.adapters is not None else None)
        finally:
            heart.close()

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
            self._host.group_lost(self.group, f"group {self.group}, rank {number}: {error}")

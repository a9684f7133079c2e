"""One rank's life in a process of its own: opens, builds, runs. Rank 0 leads its group, the others follow: for one scheduler
after another, as it is told where the next one is.

Imports `build`, `leader`, `link` and `parallel`; no ray: `actor` is its shell.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from scheduler.protocol.leaders import End, Hello, Moved
from scheduler.protocol.wire import listen
from workers.config import ResolvedWorker, SchedulerAddress, WorkerConfig
from workers.loop.adapters import GatheredReads, OnRead
from workers.loop.leader import Gathered, SchedulerGone, abandon, follow, lead
from workers.loop.ledger import Ledger, inventory
from workers.loop.link import Greeting, OnMoved, SocketFeed, SocketInbox, SocketLink
from workers.loop.pulse import Heart
from workers.loop.reports import Reporter
from workers.loop.terms import SchedulerTerms, Term
from workers.model.sources.files import Need
from workers.model.sources.find import find_checkpoint
from workers.model.sources.progress import DOWNLOADING, in_words
from workers.moving.mover import BlockMover
from workers.moving.transport import SocketTransport, open_transport
from workers.parallel.communicator import JoinedGroup
from workers.parallel.connect import connect
from workers.process.build import Built, build_rank, settle

logger = logging.getLogger(__name__)

ABANDONED = "there is no scheduler any more, and nobody says that there will be"

STEP_TIMEOUT_S = 60.0
"""How long a rank waits for another in a step: all compute the same, so that they come at the same time. A rank that is stopped
is noticed long before (`scheduler.server.vitals`); this ends what nobody else does."""


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where a group's ranks meet: rank 0's host, the port of its store, and the port of its turns."""

    host: str
    store_port: int
    feed_port: int


class RankLife:
    """host: this machine's address in the cluster. timeout_s: of meeting the other ranks. entered: called with each epoch of
    the group after the first. served: called from any thread whenever the group's scheduler says that it lives. `phase` and
    `terms` are for other threads than the one that works.
    """

    def __init__(
        self, config: WorkerConfig, resolved: ResolvedWorker, group: int, epoch: int, rank: int, timeout_s: float, host: str,
        entered: Callable[[int], None] = lambda _: None, served: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._config, self._resolved = config, resolved
        self._group, self._epoch, self._first_epoch = group, epoch, epoch
        self._rank, self._size = rank, config.tensor_parallel_size
        self._timeout_s = timeout_s
        self._host = host
        self._entered, self._served = entered, served
        self.terms = SchedulerTerms(config.abandoned_after_s)
        """Rank 0's: whom it serves, and whom next."""
        self._listener: socket.socket | None = None
        self._comm: JoinedGroup | None = None
        self._built: Built | None = None
        self._failure: BaseException | None = None
        self._rendezvous: Rendezvous | None = None
        self._beginning, self._building = threading.Lock(), threading.Lock()
        self.phase = ("placing", 0, 0)
        """What `fetch` or `build` is doing: its name, how much is done, how much there is."""

    @property
    def epoch(self) -> int:
        """Of the group, as far as this rank knows."""
        return self._epoch

    def busy(self) -> tuple[float, float]:
        """Seconds in the present step of this rank, and how many it may take; (0, 0) between steps, and before the first."""
        return (0.0, 0.0) if self._built is None else self._built.rank.pulse.busy()

    def open(self) -> Rendezvous:
        """Rank 0 only: opens the ports at which its peers meet it. Asked again, by whoever has taken the group over, they are
        the same."""
        with self._beginning:
            if self._rendezvous is None:
                self._listener = listen(self._host)
                with listen(self._host) as probe:
                    store_port = probe.getsockname()[1]
                self._rendezvous = Rendezvous(self._host, store_port, self._listener.getsockname()[1])
            return self._rendezvous

    def fetch(self) -> float:
        """What this node lacks of the checkpoint is downloaded; returns the seconds that it took. Before `build`, where other
        ranks wait for this one. Errors: CheckpointError."""
        begun_s, say = time.monotonic(), in_words(logger.info, f"{DOWNLOADING} {self._config.model}")

        def report(done: int, total: int) -> None:
            self._enter(DOWNLOADING, done, total)
            if self._rank == 0:  # the others say the same: one downloads, and all see how far it is
                say(done, total)

        find_checkpoint(self._config, Need.WEIGHTS, report)
        return time.monotonic() - begun_s

    def build(self, rendezvous: Rendezvous) -> int:
        """Joins the group, loads the weights and allocates the pool; returns its blocks. All ranks at the same time. Asked
        again, by whoever has taken the group over, this waits for what was begun: its result or its error."""
        with self._building:
            if self._failure is not None:
                raise self._failure
            if self._built is None:
                try:
                    self._built = self._build(rendezvous)
                except BaseException as error:
                    self._failure = error
                    raise
            return self._built.sizes.blocks

    def _build(self, rendezvous: Rendezvous) -> Built:
        address = f"{rendezvous.host}:{rendezvous.store_port}"
        device = torch.device("cuda", 0) if self._resolved.device == "cuda" else torch.device("cpu")
        self._rendezvous = rendezvous
        self._comm = connect(
            self._rank, self._size, device=device, address=address, timeout_s=self._timeout_s,
            custom_all_reduce=self._config.custom_all_reduce,
        )  # fmt: skip
        built = build_rank(self._config, self._resolved, self._comm, self._enter)
        self._comm.wait_at_most(STEP_TIMEOUT_S)
        settle()
        return built

    def _enter(self, phase: str, done: int, total: int) -> None:
        self.phase = (phase, done, total)

    def run(self, scheduler: SchedulerAddress) -> str:
        """The step loop, until a scheduler closes the group's log, or there is none any more; returns the reason."""
        assert self._comm is not None, "run before build"
        assert self._built is not None, "run before build"
        try:
            return self._lead(scheduler) if self._rank == 0 else self._follow(scheduler)
        finally:
            self._comm.abort("this rank has left its loop")
            self._built.rank.close()

    def _lead(self, scheduler: SchedulerAddress) -> str:
        assert self._built is not None
        assert self._comm is not None
        assert self._listener is not None
        rank, gathered, transport = self._built.rank, Gathered(self._size), self._open_transport(scheduler)
        if self._config.enable_prefix_caching:
            sizes, host = self._built.sizes, self._built.host_sizes
            rank.ledger = Ledger(rank.batch, sizes.blocks, host.blocks, sizes.narrow)
        reads = GatheredReads(self._size)
        feed = SocketFeed(
            self._listener, self._size - 1, scheduler.token, self._comm.abort, gathered.add, self._timeout_s, self._epoch,
            reads.add,
        )  # fmt: skip
        self._attach_mover(transport, gathered.add)
        self._attach_adapters(reads.add)
        ports = (transport.address, *feed.ports) if transport is not None else ()
        term: Term | None = Term(scheduler, self._epoch)
        try:
            while term is not None:
                try:
                    return self._serve(term, feed, gathered, reads, ports)
                except SchedulerGone as error:
                    logger.warning("%s; the group waits for the next one", error)
                abandon(rank, feed)
                term = self.terms.next()
                if term is not None:
                    self._enter_epoch(term.epoch)
                    gathered.forget()
                    if rank.ledger is not None:
                        rank.ledger.forget_transfers()
                    feed.epoch = term.epoch
                    feed.send((), ())  # a turn in which nothing is done but that
                    rank.step()
            feed.send([End(ABANDONED)], ())
            return ABANDONED
        finally:
            self.terms.end()
            feed.close()

    def _serve(
        self, term: Term, feed: SocketFeed, gathered: Gathered, reads: GatheredReads, ports: tuple[str, ...]
    ) -> str:  # fmt: skip
        """For one scheduler, until it closes the log. Errors: SchedulerGone, LinkClosed."""
        assert self._built is not None
        rank, scheduler = self._built.rank, term.scheduler
        told = inventory(rank.ledger) if rank.ledger is not None else []
        sizes, host = self._built.sizes, self._built.host_sizes
        hello = Hello(
            self._group, term.epoch, sizes.blocks, self._config.max_num_seqs, host.blocks, ports, len(told),
            self._first_epoch, sizes.narrow, host.narrow,
        )  # fmt: skip

        def on_alive() -> None:
            self._served()
            feed.alive()

        link = SocketLink(scheduler.host, scheduler.port, scheduler.token, hello, told, on_alive)
        self.terms.begin(term, link.close)
        gathered.send = partial(self._say_moved, link)
        heart = Heart(term.epoch, link.send, rank.pulse, feed.silence)
        try:
            return lead(rank, link, feed, self._reporter(), reads if rank.adapters is not None else None)
        finally:
            heart.close()
            link.close()

    def _say_moved(self, link: SocketLink, moved: Moved) -> None:
        assert self._built is not None
        if self._built.rank.ledger is not None:
            self._built.rank.ledger.moved(moved)
        link.send(moved)

    def _enter_epoch(self, epoch: int) -> None:
        """The group has another scheduler. Errors: TransferFailed."""
        assert self._built is not None
        assert self._built.rank.mover is not None
        self._built.rank.mover.enter(epoch)
        self._epoch = epoch
        self._entered(epoch)

    def _reporter(self) -> Reporter:
        assert self._built is not None
        return Reporter(
            self._epoch, self._resolved.report_steps, hold_s=self._resolved.report_hold_s, expert_load=self._built.expert_load
        )

    def _follow(self, scheduler: SchedulerAddress) -> str:
        assert self._built is not None
        assert self._comm is not None
        assert self._rendezvous is not None
        transport = self._open_transport(scheduler)
        greeting = Greeting(self._rank, transport.address if transport is not None else "")
        inbox = SocketInbox(
            self._rendezvous.host, self._rendezvous.feed_port, scheduler.token, greeting, self._comm.abort, self._enter_epoch,
            self._epoch, self._served,
        )  # fmt: skip
        self._attach_mover(transport, inbox.send)
        self._attach_adapters(inbox.send)
        heart = Heart(self._epoch, inbox.send)
        try:
            return follow(self._built.rank, inbox)
        finally:
            heart.close()
            inbox.close()

    def _open_transport(self, scheduler: SchedulerAddress) -> SocketTransport | None:
        """Where other groups fetch this rank's blocks; None if groups exchange none."""
        if not self._config.exchanges_blocks:
            return None
        assert self._built is not None
        return open_transport(
            self._built.pool.device,
            host=self._host,
            token=scheduler.token,
            group=self._group,
            epoch=self._epoch,
            rank=self._rank,
        )

    def _attach_adapters(self, on_read: OnRead) -> None:
        assert self._built is not None
        if self._built.rank.adapters is not None:
            self._built.rank.adapters.on_read = on_read

    def _attach_mover(self, transport: SocketTransport | None, moved: OnMoved) -> None:
        assert self._built is not None
        self._built.rank.mover = BlockMover(
            self._built.pool, self._built.host, transport, moved, rank=self._rank, epoch=self._epoch, narrow=self._built.narrow
        )

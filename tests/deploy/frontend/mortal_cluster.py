"""A scheduler behind its real socket and a group with a real model, both in threads of this process; and both can be killed."""

import asyncio
import contextlib
import itertools
import math
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing

import numpy as np

from cluster.config import EngineConfig
from cluster.engine import EngineError, EngineLost, OnDeltas, OnFailure
from cluster.local.groups import LocalFeed
from cluster.remote import SchedulerStream
from cluster.resolve import resolve
from deploy.config.load import EMBEDDED_MODEL
from kvcache.ids import GroupId
from scheduler.config.core import CoreConfig, QueueBounds
from scheduler.core import SchedulerCore
from scheduler.protocol.leaders import Hello
from scheduler.protocol.messages import NO_TOKEN, Deltas
from scheduler.protocol.wire import listen
from scheduler.server.server import SchedulerServer
from scheduler.server.stats import ClusterStatus
from scheduler.server.vitals import Vitals
from workers.loop.leader import LinkClosed, lead
from workers.loop.link import SocketLink
from workers.loop.pulse import Heart
from workers.loop.reports import Reporter
from workers.moving.mover import BlockMover
from workers.parallel.connect import Solo
from workers.process.build import build_rank

TOKEN = "secret"
HOST = "127.0.0.1"
PATIENCE_S = 120.0
BLOCK = 16
ROWS = 8
MOST_TOKENS = 128
"""Of prompt and output."""


def engine_config() -> EngineConfig:
    """In float64, so that it says the same however it is computed."""
    return EngineConfig(
        model=str(EMBEDDED_MODEL), local=True, dtype="float64", kv_memory=32 << 20, threads=1, block_size=BLOCK,
        max_num_seqs=ROWS, max_model_len=MOST_TOKENS,
    )  # fmt: skip


class Life:
    """One scheduler, at a port of its own, and its group. seed: of the seeds that it draws."""

    def __init__(self, epoch: int, seed: int, bounds: QueueBounds | None, grouped: bool, hung_after_s: float) -> None:
        resolved = resolve(engine_config(), "cpu", 1)
        self.core = SchedulerCore(CoreConfig(block_size=BLOCK, seed=seed, hung_after_s=hung_after_s), resolved, bounds)
        self.server = SchedulerServer(self.core, TOKEN, check_invariants=True)
        self.server._vitals = Vitals(time.monotonic(), math.inf)  # front ends are judged; the group is well on busy cores too
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.core.expect(GroupId(0))
        self.port = asyncio.run_coroutine_threadsafe(self.server.listen(HOST), self._loop).result(PATIENCE_S)
        self._group = threading.Thread(target=self._lead, args=(epoch,), daemon=True)
        if grouped:
            self._group.start()

    def tick(self) -> None:
        """Something happens, so that what is late is noticed."""
        self._loop.call_soon_threadsafe(lambda: self.server.call(lambda core: core._admit()))

    def cut(self) -> None:
        """The front ends' connections, and nothing else."""
        self._loop.call_soon_threadsafe(self._abort_front_ends)

    def shut_down(self) -> None:
        """Tidily, as when its cluster ends."""
        asyncio.run_coroutine_threadsafe(self.server.close(), self._loop).result(PATIENCE_S)

    def die(self) -> None:
        """At once and without a word, as a process that is killed."""
        self._loop.call_soon_threadsafe(self._abort)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        if self._group.ident is not None:
            self._group.join(PATIENCE_S)
            assert not self._group.is_alive(), "the group has not noticed"

    def _abort_front_ends(self) -> None:
        for writer in self.server._front_ends.values():
            writer.transport.abort()

    def _abort(self) -> None:
        self._abort_front_ends()
        for leader in self.server._leaders.values():
            leader.transport.abort()
        assert self.server._server is not None
        self.server._server.close()
        if self.server._looking is not None:
            self.server._looking.cancel()
        self._loop.call_soon(self._loop.call_soon, self._loop.stop)

    def _lead(self, epoch: int) -> None:
        config = engine_config()
        built = build_rank(config, resolve(config, "cpu", 1), Solo())
        with closing(built.rank):
            try:
                link = SocketLink(HOST, self.port, TOKEN, Hello(0, epoch, built.sizes.blocks, ROWS))
                built.rank.mover = BlockMover(built.pool, None, None, lambda _: None, rank=0, epoch=epoch)
                Heart(epoch, link.send, built.rank.pulse)
                lead(built.rank, link, LocalFeed(0), Reporter(epoch))
            except (LinkClosed, OSError):
                pass  # it dies with its scheduler


class Hole:
    """A network between front ends and a scheduler, that may lose all that its connections carry from then on. to: its port."""

    def __init__(self, to: Callable[[], int]) -> None:
        self._to = to
        self._listener = listen(HOST)
        self.port: int = self._listener.getsockname()[1]
        self._swallows: list[threading.Event] = []
        self._held: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def swallow(self) -> None:
        """Of the connections that there are; later ones are well."""
        for each in self._swallows:
            each.set()

    def close(self) -> None:
        for each in [self._listener, *self._held]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                near, _ = self._listener.accept()
                far, swallows = socket.create_connection((HOST, self._to())), threading.Event()
                self._held += [near, far]
                self._swallows.append(swallows)
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(one, other, swallows), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket, swallows: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                if not swallows.is_set():
                    other.sendall(data)
            if not swallows.is_set():
                other.shutdown(socket.SHUT_RDWR)


class MortalCluster:
    """A `Cluster`. deaths: how many tokens a front end hears until the scheduler dies, and the next one; another comes up at
    once. cuts: only the connection does. holes: or what it carries is lost from then on, and neither side is told. The seeds
    that a scheduler draws are its own."""

    def __init__(
        self, deaths: tuple[int, ...] = (), *, cuts: bool = False, holes: bool = False, bounds: QueueBounds | None = None
    ) -> None:
        self._epochs = itertools.count()
        self._deaths = list(deaths)
        self._cuts, self._bounds = cuts, bounds
        self._hole = Hole(lambda: self.life.port) if holes else None
        self.connections = 0
        self.gone = False
        self.life = self._live()

    def _live(self, grouped: bool = True) -> Life:
        epoch = next(self._epochs)
        return Life(epoch, epoch, self._bounds, grouped, 1e9 if self._hole is None else 8.0)

    def replace(self, *, grouped: bool = True) -> None:
        """The scheduler dies, and another comes up."""
        self.life.die()
        self.life = self._live(grouped)

    def close(self) -> None:
        self.gone = True
        self.life.die()
        if self._hole is not None:
            self._hole.close()

    def connect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> SchedulerStream:
        if self.gone:
            raise EngineLost("the cluster is gone for good")
        try:
            port = self._hole.port if self._hole is not None else self.life.port
            stream = SchedulerStream(HOST, port, TOKEN, self._counted(on_deltas), on_failure)
        except OSError as error:
            raise EngineError("there is no scheduler") from error
        self.connections += 1
        return stream

    async def status(self, maps: bool = False) -> ClusterStatus:
        return self.life.server.status(maps=maps)

    def _counted(self, on_deltas: OnDeltas) -> OnDeltas:
        """Within a connection's reading thread: what it has read when the scheduler dies is still heard."""
        heard, dead = 0, False

        def listen(deltas: Deltas) -> None:
            nonlocal heard, dead
            on_deltas(deltas)
            heard += int((np.frombuffer(deltas.tokens, np.int32) != NO_TOKEN).sum())
            if self._deaths and heard >= self._deaths[0] and not dead:
                dead = True
                self._deaths.pop(0)
                if self._hole is not None:
                    self._hole.swallow()
                elif self._cuts:
                    self.life.cut()
                else:
                    threading.Thread(target=self.replace, daemon=True).start()

        return listen


def until(what: str, true: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.005)

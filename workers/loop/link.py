"""The sockets of one group: its leader's stream to the scheduler, and the leader's turns to its peers.

Each socket has a thread that reads it, so that a lost connection is noticed while the step loop computes or waits in a
collective. Imports `leader` and `scheduler.protocol`.
"""

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from scheduler.protocol.handshake import Stranger, identify, meet
from scheduler.protocol.leaders import Adapts, Beat, Command, Hello, Inventory, Moved, Refused, Report, ToLeader
from scheduler.protocol.messages import Alive
from scheduler.protocol.silence import Silence
from scheduler.protocol.wire import FrameSocket
from workers.loop.adapters import AdapterRead, OnRead
from workers.loop.leader import LinkClosed, SchedulerGone, come

logger = logging.getLogger(__name__)

OnLost = Callable[[str], None]
OnMoved = Callable[[Moved], None]
OnAlive = Callable[[], None]
FROM_PEER: type[Moved | Beat | AdapterRead] = Moved | Beat | AdapterRead  # type: ignore[assignment]  # a union is not a type to mypy
FROM_SCHEDULER: type[ToLeader] = ToLeader  # type: ignore[assignment]


class Greeting(msgspec.Struct, frozen=True, array_like=True):
    """A peer opens its stream to the leader. port: "host:port" where other groups fetch its blocks; "" for nowhere."""

    rank: int
    port: str


class Turn(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """What a peer needs for its next turn. held: see `Rank.held`. epoch: of the group from this turn on."""

    commands: tuple[Command, ...]
    held: tuple[int, ...] = ()
    epoch: int = 0


FROM_LEADER: type[Turn | Alive] = Turn | Alive  # type: ignore[assignment]


class SocketLink:
    """The leader's `SchedulerLink`. Commands arrive in order and without a gap, or the link counts as broken."""

    def __init__(
        self, host: str, port: int, token: str, hello: Hello, told: Sequence[Inventory] = (), on_alive: OnAlive = lambda: None
    ) -> None:
        """told: what stands in the pool; `hello` says in how many parts. on_alive: called from a thread whenever the scheduler
        says that it lives. Errors: SchedulerGone if nobody listens there, or somebody who does not know the token, or goes."""
        self._on_alive = on_alive
        try:
            self._socket = meet(host, port, token, hello)
            for part in told:
                self._socket.send(part)
        except OSError as error:
            raise SchedulerGone(f"the scheduler cannot be reached: {error}") from error
        self._received: queue.SimpleQueue[tuple[Command, ...] | None] = queue.SimpleQueue()
        self._expected = 0
        threading.Thread(target=self._read, name="manta-scheduler-link", daemon=True).start()

    def receive(self, *, wait_s: float) -> Sequence[Command]:
        commands: list[Command] = []
        for batch in come(self._received, wait_s):
            if batch is None:
                self._received.put(None)
                if not commands:
                    raise SchedulerGone("the scheduler has gone")
                break  # what it has said before counts: that it closes the log, perhaps
            commands += batch
        return commands

    def send(self, message: Report | Moved | Beat | Refused | Adapts) -> None:
        """From any thread. Errors: SchedulerGone."""
        try:
            self._socket.send(message)
        except OSError as error:
            raise SchedulerGone(f"the scheduler has gone: {error}") from error

    def wake(self) -> None:
        self._received.put(())

    def close(self) -> None:
        self._socket.close()

    def _read(self) -> None:
        for batch in self._socket.messages(FROM_SCHEDULER):
            if isinstance(batch, Alive):
                self._on_alive()
                continue
            if batch.first != self._expected:
                break
            self._expected += len(batch.commands)
            self._received.put(batch.commands)
        self._received.put(None)


class SocketFeed:
    """The leader's `PeerFeed`: one connection for each other rank.

    on_lost: called from a thread when a peer has gone. on_moved, on_read: likewise, with what a peer says of a transfer, and of
    an adapter. epoch: of the group, for the peers to enter with their next turn. silence: of the peers, by rank.
    """

    def __init__(
        self, listener: socket.socket, peers: int, token: str, on_lost: OnLost, on_moved: OnMoved, timeout_s: float,
        epoch: int = 0, on_read: OnRead = lambda _: None,
    ) -> None:  # fmt: skip
        """Waits until all peers have connected, whoever else does. Errors: TimeoutError."""
        self.epoch = epoch
        self.silence = Silence(time.monotonic())
        self._token, self._on_lost, self._on_moved, self._on_read = token, on_lost, on_moved, on_read
        self._peers: dict[int, FrameSocket] = {}
        self._ports: dict[int, str] = {}
        self._came = threading.Condition()
        accepting = threading.Thread(target=self._accept, args=(listener,), name="manta-peer-accept", daemon=True)
        accepting.start()
        with self._came:
            all_here = self._came.wait_for(lambda: len(self._peers) == peers, timeout_s)
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread; nobody else is let in
        if not all_here:
            raise TimeoutError(f"{len(self._peers)} of {peers} peers came within {timeout_s:.0f} s")
        self.ports = tuple(port for _, port in sorted(self._ports.items()))
        """Where each peer's blocks are fetched, by rank."""

    def send(self, commands: Sequence[Command], held: Sequence[int] = ()) -> None:
        message = Turn(tuple(commands), tuple(held), self.epoch)
        try:
            for peer in self._peers.values():
                peer.send(message)
        except OSError as error:
            raise LinkClosed(f"a peer has gone: {error}") from error

    def alive(self) -> None:
        """Tells the peers, from any thread, that the scheduler lives. One that has gone is the step loop's to notice."""
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.send(Alive())

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()

    def _accept(self, listener: socket.socket) -> None:
        """Each is greeted in a thread of its own: one who says nothing holds up nobody."""
        with contextlib.suppress(OSError):  # it was closed
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._greet, args=(FrameSocket(connection),), name="manta-peer", daemon=True).start()

    def _greet(self, peer: FrameSocket) -> None:
        try:
            greeting = identify(peer, self._token, Greeting)
        except (Stranger, OSError) as error:
            logger.warning("refused a connection of a peer: %s", error)
            peer.close()
            return
        with self._came:
            if greeting.rank in self._peers:
                peer.close()
                return
            self._peers[greeting.rank] = peer
            self._ports[greeting.rank] = greeting.port
            self.silence.heard(greeting.rank, time.monotonic())
            self._came.notify_all()
        self._watch(greeting.rank, peer)

    def _watch(self, rank: int, peer: FrameSocket) -> None:
        """After its greeting a peer says that it lives, and speaks of transfers and adapters; steps need no answer."""
        for message in peer.messages(FROM_PEER):
            self.silence.heard(rank, time.monotonic())
            if isinstance(message, Moved):
                self._on_moved(message)
            elif isinstance(message, AdapterRead):
                self._on_read(message)
        self._on_lost("a peer has gone")


class SocketInbox:
    """A peer's `PeerInbox`. on_lost: called from a thread when the leader has gone. on_epoch: called by `receive` with each
    epoch after `epoch`, before its first turn. on_alive: called from a thread whenever the scheduler is known to live."""

    def __init__(
        self, host: str, port: int, token: str, greeting: Greeting, on_lost: OnLost, on_epoch: Callable[[int], None],
        epoch: int = 0, on_alive: OnAlive = lambda: None,
    ) -> None:  # fmt: skip
        """Errors: OSError if nobody listens there, or somebody who does not know the token."""
        self._socket = meet(host, port, token, greeting)
        self._turns: queue.SimpleQueue[Turn | None] = queue.SimpleQueue()
        self._on_lost, self._on_epoch, self._on_alive = on_lost, on_epoch, on_alive
        self._epoch = epoch
        threading.Thread(target=self._read, name="manta-leader-link", daemon=True).start()

    def receive(self) -> tuple[Sequence[Command], Sequence[int]]:
        turn = self._turns.get()
        if turn is None:
            raise LinkClosed("the leader has gone")
        if turn.epoch != self._epoch:
            self._epoch = turn.epoch
            self._on_epoch(turn.epoch)
        return turn.commands, turn.held

    def send(self, message: Moved | Beat | AdapterRead) -> None:
        """Tells the leader, from any thread. A leader that has gone is the step loop's to notice."""
        with contextlib.suppress(OSError):
            self._socket.send(message)

    def close(self) -> None:
        self._socket.close()

    def _read(self) -> None:
        for turn in self._socket.messages(FROM_LEADER):
            if isinstance(turn, Alive):
                self._on_alive()
            else:
                self._turns.put(turn)
        self._turns.put(None)
        self._on_lost("the leader has gone")

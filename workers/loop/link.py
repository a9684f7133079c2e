"""The sockets of one group: its leader's stream to the scheduler, and the leader's turns to its peers.

Each socket has a thread that reads it, so that a lost connection is noticed while the step loop computes or waits in a
collective. Imports `leader`, `scheduler.protocol.wire` and `scheduler.protocol.messages`.
"""

import contextlib
import queue
import socket
import threading
from collections.abc import Callable, Sequence

import msgspec

from scheduler.protocol.handshake import Stranger, identify, introduce
from scheduler.protocol.messages import Command, Commands, Hello, Moved, Report
from scheduler.protocol.wire import FrameSocket
from workers.loop.leader import LinkClosed

OnLost = Callable[[str], None]
OnMoved = Callable[[Moved], None]


class Greeting(msgspec.Struct, frozen=True, array_like=True):
    """A peer opens its stream to the leader. port: "host:port" where other groups fetch its blocks; "" for nowhere."""

    rank: int
    port: str


class SocketLink:
    """The leader's `SchedulerLink`. Commands arrive in order and without a gap, or the link counts as broken."""

    def __init__(self, host: str, port: int, token: str, hello: Hello) -> None:
        """Errors: OSError if nobody listens there, or somebody who does not know the token."""
        self._socket = FrameSocket.connect(host, port)
        introduce(self._socket, token, hello)
        self._received: queue.SimpleQueue[tuple[Command, ...] | None] = queue.SimpleQueue()
        self._expected = 0
        threading.Thread(target=self._read, name="manta-scheduler-link", daemon=True).start()

    def receive(self, *, wait: bool) -> Sequence[Command]:
        commands: list[Command] = []
        while wait or not self._received.empty():
            batch = self._received.get()
            if batch is None:
                raise LinkClosed("the scheduler has gone")
            commands += batch
            wait = False
        return commands

    def send(self, message: Report | Moved) -> None:
        """From any thread. Errors: LinkClosed."""
        try:
            self._socket.send(message)
        except OSError as error:
            raise LinkClosed(f"the scheduler has gone: {error}") from error

    def close(self) -> None:
        self._socket.close()

    def _read(self) -> None:
        for batch in self._socket.messages(Commands):
            if batch.first != self._expected:
                break
            self._expected += len(batch.commands)
            self._received.put(batch.commands)
        self._received.put(None)


class SocketFeed:
    """The leader's `PeerFeed`: one connection for each other rank.

    on_lost: called from a thread when a peer has gone. on_moved: likewise, with what a peer says of a transfer.
    """

    def __init__(
        self, listener: socket.socket, peers: int, token: str, on_lost: OnLost, on_moved: OnMoved, timeout_s: float
    ) -> None:
        """Waits until all peers have connected. Errors: TimeoutError."""
        self._peers: dict[int, FrameSocket] = {}
        ports: dict[int, str] = {}
        listener.settimeout(timeout_s)
        while len(self._peers) < peers:
            connection, _ = listener.accept()
            peer = FrameSocket(connection)
            try:
                greeting = identify(peer, token, Greeting)
            except (Stranger, OSError):
                peer.close()
                continue
            if greeting.rank in self._peers:
                peer.close()
                continue
            self._peers[greeting.rank] = peer
            ports[greeting.rank] = greeting.port
            watch = threading.Thread(target=_watch, args=(peer, on_lost, on_moved), name="manta-peer-watch", daemon=True)
            watch.start()
        self.ports = tuple(port for _, port in sorted(ports.items()))
        """Where each peer's blocks are fetched, by rank."""

    def send(self, commands: Sequence[Command]) -> None:
        message = Commands(0, tuple(commands))
        try:
            for peer in self._peers.values():
                peer.send(message)
        except OSError as error:
            raise LinkClosed(f"a peer has gone: {error}") from error

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()


class SocketInbox:
    """A peer's `PeerInbox`. on_lost: called from a thread when the leader has gone."""

    def __init__(self, host: str, port: int, token: str, greeting: Greeting, on_lost: OnLost) -> None:
        """Errors: OSError if nobody listens there, or somebody who does not know the token."""
        self._socket = FrameSocket.connect(host, port)
        introduce(self._socket, token, greeting)
        self._turns: queue.SimpleQueue[tuple[Command, ...] | None] = queue.SimpleQueue()
        self._on_lost = on_lost
        threading.Thread(target=self._read, name="manta-leader-link", daemon=True).start()

    def receive(self) -> Sequence[Command]:
        commands = self._turns.get()
        if commands is None:
            raise LinkClosed("the leader has gone")
        return commands

    def moved(self, moved: Moved) -> None:
        """Tells the leader of a transfer, from any thread. A leader that has gone is the step loop's to notice."""
        with contextlib.suppress(OSError):
            self._socket.send(moved)

    def close(self) -> None:
        self._socket.close()

    def _read(self) -> None:
        for turn in self._socket.messages(Commands):
            self._turns.put(turn.commands)
        self._turns.put(None)
        self._on_lost("the leader has gone")


def _watch(peer: FrameSocket, on_lost: OnLost, on_moved: OnMoved) -> None:
    """After its greeting a peer speaks of transfers only; steps need no answer."""
    for moved in peer.messages(Moved):
        on_moved(moved)
    on_lost("a peer has gone")

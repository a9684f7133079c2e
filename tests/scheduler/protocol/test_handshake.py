"""Whoever has proved nothing is bounded in time and in bytes, at every socket that somebody may reach, and holds up nobody."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from scheduler.config.core import CoreConfig
from scheduler.core import SchedulerCore
from scheduler.protocol import handshake
from scheduler.protocol.handshake import MAX_HANDSHAKE_BYTES, Stranger, identify, introduce, meet
from scheduler.protocol.leaders import End
from scheduler.protocol.messages import Connect
from scheduler.protocol.wire import FrameSocket, listen
from scheduler.server.server import SchedulerServer
from workers.loop.link import Greeting, SocketFeed, SocketInbox
from workers.moving import transport
from workers.moving.transport import open_transport

TOKEN = "secret"
PATIENCE_S = 60.0
HOST = "127.0.0.1"
Port = int


@contextlib.contextmanager
def scheduler() -> Iterator[Port]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = SchedulerServer(SchedulerCore(CoreConfig(block_size=16)), TOKEN)
    try:
        yield asyncio.run_coroutine_threadsafe(server.listen(HOST), loop).result(PATIENCE_S)
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(PATIENCE_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE_S)


@contextlib.contextmanager
def leader() -> Iterator[Port]:
    """One that waits for a peer."""

    def wait() -> None:
        with contextlib.suppress(TimeoutError):
            SocketFeed(listener, 1, TOKEN, lambda _: None, lambda _: None, PATIENCE_S).close()

    with listen(HOST) as listener:
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        port: int = listener.getsockname()[1]
        yield port
        SocketInbox(HOST, port, TOKEN, Greeting(1, ""), lambda _: None, lambda _: None).close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the peer was let in all the same"


@contextlib.contextmanager
def sender() -> Iterator[Port]:
    """A rank whose blocks others fetch."""
    opened = open_transport(torch.device("cpu"), host=HOST, token=TOKEN, group=0, epoch=0, rank=0)
    try:
        yield int(opened.address.rpartition(":")[2])
    finally:
        opened.close()


DOORS = {"scheduler": scheduler, "leader": leader, "sender": sender}
everywhere = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
Door = Callable[[], contextlib.AbstractContextManager[Port]]


def ends(connection: socket.socket) -> bool:
    """It is closed by the other side."""
    connection.settimeout(PATIENCE_S)
    with contextlib.suppress(ConnectionError):
        while connection.recv(1 << 16):
            pass
    return True


@everywhere
def test_who_says_nothing_is_left(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    patience(monkeypatch, 0.2)
    with door() as port, socket.create_connection((HOST, port)) as stranger:
        assert ends(stranger)


@everywhere
def test_so_is_who_says_it_byte_by_byte(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    patience(monkeypatch, 0.5)
    with door() as port, socket.create_connection((HOST, port)) as stranger:
        stranger.sendall((MAX_HANDSHAKE_BYTES - 1).to_bytes(4, "little"))
        with contextlib.suppress(ConnectionError):
            for _ in range(int(PATIENCE_S / 0.1)):
                stranger.sendall(b"x")
                time.sleep(0.1)
            raise AssertionError("it was listened to")


@everywhere
def test_nobody_announces_more_than_a_greeting_before_he_is_known(door: Door) -> None:
    with door() as port, socket.create_connection((HOST, port)) as stranger:
        stranger.sendall((MAX_HANDSHAKE_BYTES + 1).to_bytes(4, "little"))
        began_s = time.monotonic()
        assert ends(stranger)
        assert time.monotonic() - began_s < handshake.HANDSHAKE_TIMEOUT_S, "its length was enough"


def test_strangers_who_say_nothing_keep_no_peer_from_its_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    patience(monkeypatch, 1000.0)
    with listen(HOST) as listener, contextlib.ExitStack() as strangers:
        port = listener.getsockname()[1]
        for _ in range(8):
            strangers.enter_context(socket.create_connection((HOST, port)))
        inboxes: list[SocketInbox] = []

        def join() -> None:
            inboxes.append(SocketInbox(HOST, port, TOKEN, Greeting(1, "p:1"), lambda _: None, lambda _: None))

        peer = threading.Thread(target=join, daemon=True)
        peer.start()
        feed = SocketFeed(listener, 1, TOKEN, lambda _: None, lambda _: None, PATIENCE_S)
        peer.join(PATIENCE_S)
        feed.send([End("done")])
        assert inboxes[0].receive() == ((End("done"),), ())
        feed.close()
        inboxes[0].close()


def test_a_listener_who_says_nothing_is_left_too(monkeypatch: pytest.MonkeyPatch) -> None:
    patience(monkeypatch, 0.2)
    with listen(HOST) as silent:
        connection = FrameSocket.connect(HOST, silent.getsockname()[1])
        with pytest.raises(Stranger):
            introduce(connection, TOKEN, Greeting(1, ""))
        connection.close()


def patience(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", seconds)
    monkeypatch.setattr(handshake, "ANSWER_TIMEOUT_S", seconds)
    monkeypatch.setattr(transport, "HANDSHAKE_TIMEOUT_S", seconds)


def test_who_was_cut_short_though_he_knows_the_token_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may be slower than a stranger is allowed to be."""
    with listen(HOST) as listener:
        heard: list[Greeting] = []

        def hurry() -> None:
            FrameSocket(listener.accept()[0]).close()
            heard.append(identify(FrameSocket(listener.accept()[0]), TOKEN, Greeting))

        thread = threading.Thread(target=hurry, daemon=True)
        thread.start()
        meet(HOST, listener.getsockname()[1], TOKEN, Greeting(1, "p:1")).close()
        thread.join(PATIENCE_S)
        assert heard == [Greeting(1, "p:1")]
    monkeypatch.setattr(handshake, "PAUSE_S", 0.0)
    with scheduler() as port, pytest.raises(Stranger):
        meet(HOST, port, "guess", Connect())

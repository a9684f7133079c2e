"""Who may fetch blocks, and what a transfer does when the other side hangs, dies or lies."""

import hmac
import multiprocessing
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch

from kvcache.layout import BlockLayout
from scheduler.protocol.handshake import Challenge, Claim, Confirmed, challenge, claim, confirm
from scheduler.protocol.leaders import Cut, Receive
from scheduler.protocol.wire import frame
from tests.workers.moving.movers import LAYOUT, PATIENCE_S, TOKEN, Site, World, ids, random_pool
from workers.moving.connection import Connection, Fetch, PairOffer
from workers.moving.lane import TransferFailed
from workers.moving.transport import runs

LARGE = BlockLayout(block_size=256, layers=8, kv_heads=4, head_dim=64, dtype="float32")  # 4 MiB a block
FORWARD = 16  # of them: more than any socket buffers


@pytest.fixture
def world() -> Iterator[World]:
    one = World("socket")
    yield one
    one.close()


def greet(
    site: Site, transfer: int, *, token: str = TOKEN, epoch: int = 0, blocks: int = 1, block_bytes: int = 0
) -> Connection:
    """A receiver by hand, group 2, epoch 0, up to its request."""
    assert site.transport is not None
    connection = Connection.connect(site.transport.address, PATIENCE_S)
    size = block_bytes or site.pool.layout.block_bytes
    asked = connection.receive(Challenge)
    connection.send(claim(token, asked, Fetch(transfer, 2, 0, site.group, epoch, 0, blocks, size, 0)))
    return connection


def other(site: Site) -> Site:
    """What `greet` pretends to be, as the sender is told of it."""
    return Site(2, 0, site.pool, site.mover, None, site.said)


def test_a_receiver_by_hand_gets_the_bytes(world: World) -> None:
    """The other tests can fail: with the right words the same connection is served."""
    here = world.site(1)
    here.send(1, other(here), [5])
    connection = greet(here, 1)
    assert len(connection.receive(Confirmed).proof) == 32
    connection.receive(PairOffer)
    content = bytearray(LAYOUT.block_bytes)
    connection.receive_bytes(memoryview(content))
    assert bytes(content) == here.pool.raw[5].numpy().tobytes()
    connection.close()
    moved = here.said.wait(1)
    assert (moved.ok, moved.message) == (False, "the other side has gone"), "it never said that it has everything"


@pytest.mark.parametrize("wrong", [{"token": "guessed"}, {"epoch": 7}])
def test_who_does_not_know_the_token_or_means_another_gets_nothing(world: World, wrong: dict[str, Any]) -> None:
    here = world.site(1)
    here.send(1, other(here), [5])
    stranger = greet(here, 1, **wrong)
    with pytest.raises(TransferFailed, match="has gone"):
        stranger.receive(Confirmed)
    stranger.close()
    assert here.said.moved == []
    greet(here, 1).close()  # one who does is heard all the same
    assert not here.said.wait(1).ok


def test_a_recorded_greeting_is_worth_nothing(world: World) -> None:
    here = world.site(1)
    assert here.transport is not None
    first = Connection.connect(here.transport.address, PATIENCE_S)
    second = Connection.connect(here.transport.address, PATIENCE_S)
    asked = first.receive(Challenge)
    assert second.receive(Challenge) != asked
    second.send(claim(TOKEN, asked, Fetch(1, 2, 0, 1, 0, 0, 1, LAYOUT.block_bytes, 0)))
    with pytest.raises(TransferFailed, match="has gone"):
        second.receive(Confirmed)
    first.close()
    second.close()


JUNK = (b"GET / HTTP/1.1\r\n\r\n", struct.pack("<I", 5) + b"\xc1" * 5, struct.pack("<I", 1 << 31), b"")


@pytest.mark.parametrize("junk", JUNK)
def test_junk_is_refused_and_the_port_goes_on(world: World, junk: bytes) -> None:
    here, there = world.site(1), world.site(2)
    assert here.transport is not None
    host, port = here.transport.address.rsplit(":", 1)
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(junk)
        if junk:
            stranger.settimeout(PATIENCE_S)
            while stranger.recv(1 << 16):  # until it is closed on the other side
                pass
    here.send(1, there, [3])
    there.receive(1, here, [4])
    assert there.said.wait(1).ok


def test_the_token_does_not_travel_and_an_impostor_is_found_out(world: World) -> None:
    """Whoever listens where the sender should be learns nothing that would open another door, and is not believed."""
    there = world.site(2)
    heard = []

    def impostor(listener: socket.socket) -> None:
        connection = Connection(listener.accept()[0], PATIENCE_S)
        asked = challenge()
        connection.send(asked)
        said = connection.receive(Claim)
        heard.append(frame(said))
        guessed = claim("guessed", asked, msgspec.Raw(said.opening))
        connection.send(confirm("guessed", asked, guessed))
        connection.send(PairOffer(0))
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=impostor, args=(listener,))
        thread.start()
        there.take(Receive(1, ids([3]), 1, 0, (f"127.0.0.1:{listener.getsockname()[1]}",)))
        moved = there.said.wait(1)
        thread.join()
    assert not moved.ok
    assert "does not know the cluster's token" in moved.message
    assert TOKEN.encode() not in heard[0]
    assert hmac.digest(TOKEN.encode(), b"", "sha256") not in heard[0]


def test_nobody_listens_at_the_sender_s_port(world: World) -> None:
    there = world.site(2)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    there.take(Receive(1, ids([3]), 1, 0, (f"127.0.0.1:{port}",)))
    moved = there.said.wait(1)
    assert not moved.ok
    assert f"127.0.0.1:{port} cannot be reached" in moved.message


# ---- in the midst


def test_a_cut_in_the_midst_of_the_bytes(world: World) -> None:
    """A receiver that takes no more than the first bytes: the sender hangs in its socket until it is told."""
    here = world.site(1, pool=random_pool(FORWARD, layout=LARGE))
    here.send(1, other(here), range(FORWARD))
    connection = greet(here, 1, blocks=FORWARD)
    connection.receive(Confirmed)
    connection.receive(PairOffer)
    connection.receive_bytes(memoryview(bytearray(1000)))
    assert here.said.moved == []
    here.take(Cut(2, 0))
    moved = here.said.wait(1)
    assert (moved.ok, moved.message) == (False, "epoch 0 of group 2 has gone")
    connection.close()


def test_a_silent_receiver_is_left_after_the_timeout() -> None:
    world = World("socket", timeout_s=0.3)
    try:
        here = world.site(1, pool=random_pool(FORWARD, layout=LARGE))
        connection = greet(here, 1, blocks=FORWARD)
        connection.receive(Confirmed)
        here.send(1, other(here), range(FORWARD))
        connection.receive(PairOffer)
        assert "silent for 0.3 s" in here.said.wait(1).message
        connection.close()
    finally:
        world.close()


def test_a_cut_in_the_midst_on_the_receiving_side(world: World) -> None:
    """A sender that stops after half a block."""
    there = world.site(2)
    begun = threading.Event()

    def sender(listener: socket.socket) -> None:
        connection = Connection(listener.accept()[0], PATIENCE_S)
        asked = challenge()
        connection.send(asked)
        connection.send(confirm(TOKEN, asked, connection.receive(Claim)))
        connection.send(PairOffer(0))
        connection.send_bytes(memoryview(bytes(LAYOUT.block_bytes // 2)))
        begun.set()
        with pytest.raises(TransferFailed):
            connection.receive(PairOffer)  # until the receiver hangs up
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=sender, args=(listener,))
        thread.start()
        there.take(Receive(1, ids([3]), 1, 0, (f"127.0.0.1:{listener.getsockname()[1]}",)))
        assert begun.wait(PATIENCE_S)
        there.take(Cut(1, 0))
        moved = there.said.wait(1)
        thread.join()
    assert (moved.ok, moved.message) == (False, "epoch 0 of group 1 has gone")


def _receive_and_stop(address: str, pipe: Any) -> None:
    """In another process: asks for many blocks, takes a few bytes, and is killed."""
    connection = Connection.connect(address, PATIENCE_S)
    asked = connection.receive(Challenge)
    connection.send(claim(TOKEN, asked, Fetch(1, 2, 0, 1, 0, 0, FORWARD, LARGE.block_bytes, 0)))
    connection.receive(Confirmed)
    connection.receive(PairOffer)
    pipe.send("begun")
    time.sleep(PATIENCE_S)


def test_a_receiver_that_is_killed_in_the_midst(world: World) -> None:
    here, there = world.site(1, pool=random_pool(FORWARD, layout=LARGE)), world.site(3, pool=random_pool(4, layout=LARGE))
    assert here.transport is not None
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_receive_and_stop, args=(here.transport.address, theirs))
    process.start()
    here.send(1, other(here), range(FORWARD))
    assert ours.recv() == "begun"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    moved = here.said.wait(1)
    assert not moved.ok
    assert "the other side has gone" in moved.message
    process.join()
    here.send(2, there, [0, 1])
    there.receive(2, here, [2, 3])
    assert there.said.wait(2).ok
    assert torch.equal(there.pool.raw[2:4], here.pool.raw[0:2])


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [([], []), ([3], [(3, 4)]), ([3, 4, 5, 9, 10, 0], [(3, 6), (9, 11), (0, 1)]), ([2, 1, 0], [(2, 3), (1, 2), (0, 1)])],
)
def test_adjacent_blocks_are_one_run(blocks: list[int], expected: list[tuple[int, int]]) -> None:
    assert list(runs(blocks)) == expected

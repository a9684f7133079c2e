"""Blocks between ranks of different processes: who fetches what from whom. How the bytes travel is a `Wire`'s business.

The receiver connects to the sender, once for each transfer, so a failure is a socket that ends, on both sides, and touches
no other transfer. Imports the mover's types, `connection` and the pool.
"""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Protocol

import msgspec
import torch

from scheduler.protocol.handshake import (
    ANSWER_TIMEOUT_S,
    HANDSHAKE_TIMEOUT_S,
    MAX_HANDSHAKE_BYTES,
    Challenge,
    Claim,
    Confirmed,
    Stranger,
    challenge,
    check_confirmed,
    claim,
    confirm,
)
from scheduler.protocol.wire import cut_after, listen
from workers.moving.connection import Connection, Done, Fetch, PairOffer
from workers.moving.lane import TransferFailed
from workers.moving.mapped import DeviceMemory, MappedWire
from workers.moving.mover import TIMEOUT_S, Shard
from workers.moving.pairs import PairWire

logger = logging.getLogger(__name__)

ACCEPT_AGAIN_S = 0.1


class Wire(Protocol):
    """How the blocks of one transfer cross once both sides have met.

    pair: a number that names what the two ranks keep between transfers, such as a communicator; 0: nothing.
    """

    def host(self, shard: Shard) -> str:
        """Where this receiver could map the sender's memory; "" for nowhere."""
        ...

    def standing(self, shard: Shard) -> int:
        """The pair that this receiver has with the sender."""
        ...

    def agree(self, shard: Shard, fetch: Fetch) -> int:
        """The sender's choice, given what the receiver has."""
        ...

    def send(self, connection: Connection, shard: Shard, pair: int) -> None:
        """Returns once the blocks have been read."""
        ...

    def receive(self, connection: Connection, shard: Shard, pair: int) -> None:
        """Returns once the blocks are here and the device is done with them."""
        ...

    def forget(self, group: int, epoch: int, *, sending: bool) -> None: ...

    def close(self) -> None:
        """Nothing is kept of any pair. Calls may follow."""
        ...


class SocketWire:
    """Straight from block to socket to block, for pools in host memory. Adjacent blocks go in one call.

    gloo was the alternative: `python -m benchmarks.engine.transfer` compares them. It copies once more, and can be neither
    interrupted nor told who may connect.
    """

    def host(self, shard: Shard) -> str:
        del shard
        return ""

    def standing(self, shard: Shard) -> int:
        del shard
        return 0

    def agree(self, shard: Shard, fetch: Fetch) -> int:
        del shard, fetch
        return 0

    def send(self, connection: Connection, shard: Shard, pair: int) -> None:
        del pair
        for run in self._runs(shard):
            connection.send_bytes(run)

    def receive(self, connection: Connection, shard: Shard, pair: int) -> None:
        del pair
        for run in self._runs(shard):
            connection.receive_bytes(run)

    def forget(self, group: int, epoch: int, *, sending: bool) -> None:
        """Nothing is kept of a pair."""

    def close(self) -> None:
        """Nothing is kept."""

    def _runs(self, shard: Shard) -> Iterator[memoryview]:
        raw = shard.pool.raw
        for first, end in runs(shard.blocks):
            yield raw[first:end].view(-1).numpy().data


class SocketTransport:
    """The `Transport` of one rank. host: what it listens on, and nothing else. token: the cluster's secret, which both sides
    of a connection prove to know before a block travels; what follows is neither encrypted nor signed."""

    def __init__(
        self, wire: Wire, *, host: str, token: str, group: int, epoch: int, rank: int, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._wire = wire
        self._token = token
        self._me = (group, epoch, rank)
        self._timeout_s = timeout_s
        self._arrived: dict[tuple[int, int, int], tuple[Connection, Fetch, float]] = {}
        self._open: set[Connection] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._listener = listen(host)
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, name=f"manta-move-accept-rank{rank}", daemon=True)]
        self._threads[0].start()

    # ---- Transport

    def send(self, shard: Shard) -> float:
        connection, fetch = self._await(shard)
        with closing(connection), shard.abort.waking(connection.shut):
            if (fetch.blocks, fetch.block_bytes) != (len(shard.blocks), shard.pool.layout.block_bytes):
                raise TransferFailed("the two sides do not agree on the blocks")
            pair = self._wire.agree(shard, fetch)
            connection.send(PairOffer(pair))
            began_s = time.perf_counter()
            self._wire.send(connection, shard, pair)
            connection.receive_done()
            return time.perf_counter() - began_s

    def receive(self, shard: Shard) -> float:
        connection = Connection.connect(shard.port, self._timeout_s)
        with closing(connection), shard.abort.waking(connection.shut):
            group, epoch, rank = self._me
            fetch = Fetch(
                shard.transfer, group, epoch, shard.group, shard.epoch, rank, len(shard.blocks),
                shard.pool.layout.block_bytes, self._wire.standing(shard), self._wire.host(shard),
            )  # fmt: skip
            try:
                with cut_after(ANSWER_TIMEOUT_S, connection.shut):
                    said = claim(self._token, connection.receive(Challenge, MAX_HANDSHAKE_BYTES), fetch)
                    connection.send(said)
                    check_confirmed(self._token, said, connection.receive(Confirmed, MAX_HANDSHAKE_BYTES))
            except Stranger as error:
                raise TransferFailed(f"whoever listens at {shard.port} does not know the cluster's token") from error
            offer = connection.receive(PairOffer)
            began_s = time.perf_counter()
            self._wire.receive(connection, shard, offer.pair)
            connection.send(Done())
            return time.perf_counter() - began_s

    def forget(self, group: int, epoch: int, *, sending: bool) -> None:
        self._wire.forget(group, epoch, sending=sending)

    def enter(self, epoch: int) -> None:
        group, _, rank = self._me
        with self._changed:
            self._me = (group, epoch, rank)
            arrived, self._arrived = self._arrived, {}
        for connection, *_ in arrived.values():
            connection.close()
        self._wire.close()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            waiting = [connection for connection, *_ in self._arrived.values()]
            for connection in [*waiting, *self._open]:
                connection.shut()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(HANDSHAKE_TIMEOUT_S)
        for connection in waiting:
            connection.close()
        self._wire.close()

    # ---- those who fetch

    def _await(self, shard: Shard) -> tuple[Connection, Fetch]:
        """The connection of the receiver that wants this transfer."""
        key = (shard.group, shard.epoch, shard.transfer)
        with shard.abort.waking(self._wake), self._changed:
            came = self._changed.wait_for(lambda: key in self._arrived or shard.abort.reason or self._closed, self._timeout_s)
            shard.abort.check()
            if not came or self._closed:
                raise TransferFailed(f"nobody fetched the blocks within {self._timeout_s:g} s")
            connection, fetch, _ = self._arrived.pop(key)
        return connection, fetch

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _accept(self) -> None:
        while True:
            try:
                connection = Connection(self._listener.accept()[0], HANDSHAKE_TIMEOUT_S)
            except OSError as error:
                if self._closed:
                    return
                logger.warning("a connection for blocks could not be taken: %s", error)
                time.sleep(ACCEPT_AGAIN_S)
                continue
            thread = threading.Thread(target=self._greet, args=(connection,), name="manta-move-greet", daemon=True)
            with self._changed:
                if self._closed:
                    connection.close()
                    return
                self._open.add(connection)
                self._threads = [self._threads[0], *(other for other in self._threads[1:] if other.is_alive()), thread]
                thread.start()

    def _greet(self, connection: Connection) -> None:
        """Leaves the connection for `_await` if whoever connects knows the token and means this rank."""
        try:
            with cut_after(HANDSHAKE_TIMEOUT_S, connection.shut):
                asked = challenge()
                connection.send(asked)
                said = connection.receive(Claim, MAX_HANDSHAKE_BYTES)
                answer, fetch = confirm(self._token, asked, said), msgspec.msgpack.decode(said.opening, type=Fetch)
                if (fetch.of_group, fetch.of_epoch, fetch.rank) != self._me:
                    raise TransferFailed("it wants another rank, or one that was here before")
                connection.send(answer)
        except (TransferFailed, Stranger, msgspec.DecodeError) as error:
            logger.warning("refused a connection for blocks: %s", error)
            with self._changed:
                self._open.discard(connection)
            connection.close()
            return
        connection.timeout(self._timeout_s)
        with self._changed:
            self._open.discard(connection)
            if self._closed or (fetch.of_group, fetch.of_epoch, fetch.rank) != self._me:  # it has entered another meanwhile
                connection.close()
                return
            self._expire()
            self._arrived[fetch.group, fetch.epoch, fetch.transfer] = (connection, fetch, time.monotonic())
            self._changed.notify_all()

    def _expire(self) -> None:
        """Those whose receiver has given up long ago, since the transfer failed on this side before it came."""
        since_s = time.monotonic() - 2 * self._timeout_s
        for key in [key for key, (*_, came_s) in self._arrived.items() if came_s < since_s]:
            self._arrived.pop(key)[0].close()


def open_transport(
    device: torch.device, *, host: str, token: str, group: int, epoch: int, rank: int
) -> SocketTransport:  # fmt: skip
    """The transport of a rank, with the wire that suits its device."""
    wire = MappedWire(PairWire(device), DeviceMemory(device)) if device.type == "cuda" else SocketWire()
    return SocketTransport(wire, host=host, token=token, group=group, epoch=epoch, rank=rank)


def runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[first, end) of blocks that follow one another, in order."""
    first = end = -1
    for block in blocks:
        if block != end and end >= 0:
            yield first, end
        if block != end:
            first = block
        end = block + 1
    if end >= 0:
        yield first, end

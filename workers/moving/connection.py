"""The socket of one transfer between two ranks: who may use it, a few small frames, then bytes. No torch.

    receiver ──connects──▶ sender
             ◀──handshake──▶          `scheduler.protocol.handshake`; the claim's opening is a `Fetch`: what is wanted
             ◀──PairOffer──────           by which communicator, or by mapped memory
             ◀══ blocks ════           as the two have agreed: over this connection, or beside it
             ───Done───────▶

Every wait ends after `timeout_s` without a byte, or with `shut` from another thread.
"""

import contextlib
import socket
import struct
from collections.abc import Callable
from typing import TypeVar

import msgspec

from scheduler.protocol.handshake import Challenge, Claim, Confirmed
from scheduler.protocol.wire import frame
from workers.host import SharedMemory
from workers.moving.lane import TransferFailed

CONNECT_TIMEOUT_S = 10.0
MAX_FRAME_BYTES = 1 << 20
MAPPED = -1
_LENGTH = struct.Struct("<I")

T = TypeVar("T")


class Fetch(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """group, epoch: the receiver's. of_group, of_epoch, rank: whom it wants to talk to. pair: the communicator that it has with
    the sender, 0 for none. host: where it could map the sender's memory (`workers.host`), "" for nowhere."""

    transfer: int
    group: int
    epoch: int
    of_group: int
    of_epoch: int
    rank: int
    blocks: int
    block_bytes: int
    pair: int
    host: str = ""


class PairOffer(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """pair: the communicator to use: the one that both have, or a new one. MAPPED: none, but the sender's own memory."""

    pair: int


class StoreEntry(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """A key of the store by which the two make a communicator."""

    key: str
    value: bytes


class Readable(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """The sender's blocks can be read in its pool. blocks: [n] int32. sample: what the first of them begins with."""

    pool: SharedMemory
    blocks: bytes
    sample: bytes


class Mapped(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Whether the receiver reads there; where it cannot, a PairOffer follows."""

    ok: bool


class Done(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The receiver has everything."""


class Connection:
    """Owned by one thread; only `shut` may be called from others. Errors of all calls: TransferFailed."""

    def __init__(self, connected: socket.socket, timeout_s: float) -> None:
        self._socket = connected
        connected.setblocking(True)  # blocking calls move whole blocks without Python's lock; the system keeps the time
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.timeout(timeout_s)

    @classmethod
    def connect(cls, address: str, timeout_s: float) -> "Connection":
        host, port = address.rsplit(":", 1)
        try:
            return cls(socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S), timeout_s)
        except OSError as error:
            raise TransferFailed(f"{address} cannot be reached: {error}") from error

    def timeout(self, seconds: float) -> None:
        """For every wait from now on, without a byte."""
        self._timeout_s = seconds
        interval = struct.pack("ll", int(seconds), max(1, int(seconds % 1 * 1e6)))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)

    # ---- frames

    def send(self, message: Challenge | Claim | Confirmed | PairOffer | StoreEntry | Readable | Mapped | Done) -> None:
        self.send_bytes(memoryview(frame(message)))

    def receive(self, kind: type[T], most: int = MAX_FRAME_BYTES) -> T:
        """The next frame, which must be of that kind (a union of kinds too), and of so many bytes at most."""
        head = bytearray(_LENGTH.size)
        self.receive_bytes(memoryview(head))
        (length,) = _LENGTH.unpack(head)
        if length > most:
            raise TransferFailed("the other side sent what is not the protocol")
        payload = bytearray(length)
        self.receive_bytes(memoryview(payload))
        try:
            return msgspec.msgpack.decode(payload, type=kind)
        except msgspec.DecodeError as error:
            raise TransferFailed(f"the other side sent what is not the protocol: {error}") from error

    def receive_done(self) -> None:
        """Passes over what is left of a store."""
        kinds: type[StoreEntry | Done] = StoreEntry | Done  # type: ignore[assignment]
        while not isinstance(self.receive(kinds), Done):
            pass

    # ---- bytes

    def send_bytes(self, view: memoryview) -> None:
        while view:
            view = view[self._call(lambda left=view: self._socket.send(left)) :]  # type: ignore[misc]

    def receive_bytes(self, view: memoryview) -> None:
        while view:
            received = self._call(lambda left=view: self._socket.recv_into(left, 0, socket.MSG_WAITALL))  # type: ignore[misc]
            if not received:
                raise TransferFailed("the other side has gone")
            view = view[received:]

    def check(self) -> None:
        """Errors: TransferFailed if the other side has gone. Does not wait; what it has sent stays to be read."""
        try:
            if self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"":
                raise TransferFailed("the other side has gone")
        except BlockingIOError:
            pass
        except OSError as error:
            raise TransferFailed(f"the other side has gone: {error}") from error

    def shut(self) -> None:
        """Ends both directions: whoever waits here wakes up."""
        with contextlib.suppress(OSError):  # the other side was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.shut()
        self._socket.close()

    def _call(self, call: Callable[[], int]) -> int:
        try:
            return call()
        except BlockingIOError:
            raise TransferFailed(f"the other side was silent for {self._timeout_s:g} s") from None
        except OSError as error:
            raise TransferFailed(f"the other side has gone: {error}") from error

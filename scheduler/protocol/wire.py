"""Frames on a socket that stays open: a length, then msgpack. Blocking for workers and front ends, asyncio for the scheduler.

10 to 25 times cheaper than a Ray actor call, and ordered, which calls to an asyncio actor are not.
Imports msgspec and the standard library.
"""

import asyncio
import contextlib
import logging
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 1 << 28
"""Of those who have proved who they are (`handshake`); whoever has much to say says it in parts."""

CONNECT_TIMEOUT_S = 30.0

_encoder = msgspec.msgpack.Encoder()


def frame(message: Any) -> bytes:
    """One message, ready to be written."""
    payload = _encoder.encode(message)
    return _LENGTH.pack(len(payload)) + payload


@contextlib.contextmanager
def cut_after(seconds: float, cut: Callable[[], None]) -> Iterator[None]:
    """Calls `cut` from another thread if what is done within takes longer, however many bytes come meanwhile."""
    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


async def read_frame(reader: asyncio.StreamReader, most: int = MAX_FRAME_BYTES) -> bytes | None:
    """The next frame's payload; None at the end of the stream, also in the middle of a frame, and for one of more bytes."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > most:
            return None
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, OSError) as error:  # not ConnectionError alone: a host that went away times out
        error.__traceback__ = None  # it leads to the reader, which keeps the error: both would wait for a full collection
        return None


def write_frame(writer: asyncio.StreamWriter, message: Any) -> None:
    """Sends one message. A connection that cannot take it ends: whoever reads it hears of that, and nobody else. Never raises:
    uvloop does, where asyncio drops what is written, if the other side has gone and the reader has not been told yet."""
    if writer.is_closing():
        return
    try:
        writer.write(frame(message))
    except Exception as error:  # said, not handed on: it leads to the writer, and whoever keeps log records would keep both
        logger.error("cannot send to %s, so the connection ends: %s", writer.get_extra_info("peername"), str(error))
        writer.transport.abort()


class FrameSocket:
    """A connected stream socket. `send` may be called from any thread, `receive` from one at a time."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._reader = connection.makefile("rb", buffering=1 << 16)
        self._sending = threading.Lock()

    @classmethod
    def connect(cls, host: str, port: int) -> "FrameSocket":
        """Errors: OSError if nobody listens there."""
        return cls(socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S))

    def send(self, message: Any) -> None:
        """Errors: OSError when the other side has gone."""
        data = frame(message)
        with self._sending:
            self._socket.sendall(data)

    def receive(self, most: int = MAX_FRAME_BYTES) -> bytes | None:
        """Waits for the next frame's payload; None when the other side has gone, sends one of more bytes, or `close` was
        called."""
        try:
            head = self._reader.read(_LENGTH.size)
            if len(head) < _LENGTH.size:
                return None
            (length,) = _LENGTH.unpack(head)
            payload = self._reader.read(length) if length <= most else b""
        except (OSError, ValueError):
            return None
        return payload if len(payload) == length else None

    def messages(self, kind: type[T]) -> Iterator[T]:
        """Every message until the other side has gone or `close` was called. One that is not of this kind is logged, and
        ends the connection."""
        decoder = msgspec.msgpack.Decoder(kind)
        while (payload := self.receive()) is not None:
            try:
                message = decoder.decode(payload)
            except msgspec.DecodeError as error:
                logger.error("a connection sent what is not the protocol: %s", error)
                self.close()
                return
            yield message

    def patience(self, seconds: float) -> contextlib.AbstractContextManager[None]:
        """What is done within it and takes longer ends as if the other side had gone; the socket is of no use then."""
        return cut_after(seconds, self.close)

    def close(self) -> None:
        """Ends both directions; a thread in `receive` wakes up with None."""
        with contextlib.suppress(OSError):  # the other side was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def listen(host: str) -> socket.socket:
    """A listening TCP socket on a port that the system chose."""
    return socket.create_server((host, 0), backlog=128)

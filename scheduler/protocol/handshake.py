"""One secret, one way to know it: whoever connects and whoever is connected to prove that they have the cluster's token.

    connecting side          accepting side
                 ◀──Challenge──     a number drawn for this connection
      ───Claim──────▶               what it wants to be, and proof over that and both numbers
                 ◀──Confirmed──     proof over the claim's own number

The token itself never travels, and a proof is good for one connection. What follows is neither encrypted nor signed. Used by
every socket between Manta's processes: to the scheduler, within a group, between groups. Imports `wire`.
"""

import asyncio
import hmac
import secrets
import time
from typing import TypeVar

import msgspec

from scheduler.protocol.wire import FrameSocket, read_frame, write_frame

HANDSHAKE_TIMEOUT_S = 5.0
"""Of whoever is connected to, for all of it, however slowly the other side speaks."""

ANSWER_TIMEOUT_S = 60.0
"""Of whoever connects: the other side may be about to listen, and he has chosen it."""

TRIES = 3
PAUSE_S = 0.2

MAX_HANDSHAKE_BYTES = 4096
"""Of a frame of somebody who has not proved anything yet."""

T = TypeVar("T")


class Stranger(ConnectionError):
    """The other side does not know the token, or does not speak the protocol."""


class Challenge(msgspec.Struct, frozen=True, array_like=True, tag="challenge"):
    nonce: bytes


class Claim(msgspec.Struct, frozen=True, array_like=True, tag="claim"):
    """opening: the message by which this side says what it is, encoded."""

    opening: bytes
    nonce: bytes
    proof: bytes


class Confirmed(msgspec.Struct, frozen=True, array_like=True, tag="confirmed"):
    proof: bytes


def challenge() -> Challenge:
    return Challenge(secrets.token_bytes(16))


def claim(token: str, asked: Challenge, opening: object) -> Claim:
    encoded, nonce = msgspec.msgpack.encode(opening), secrets.token_bytes(16)
    return Claim(encoded, nonce, _prove(token, b"claim", asked.nonce, nonce, encoded))


def confirm(token: str, asked: Challenge, said: Claim) -> Confirmed:
    """Errors: Stranger."""
    if not hmac.compare_digest(said.proof, _prove(token, b"claim", asked.nonce, said.nonce, said.opening)):
        raise Stranger("it does not know the cluster's token")
    return Confirmed(_prove(token, b"confirmed", said.nonce))


def check_confirmed(token: str, said: Claim, answer: Confirmed) -> None:
    """Errors: Stranger."""
    if not hmac.compare_digest(answer.proof, _prove(token, b"confirmed", said.nonce)):
        raise Stranger("it does not know the cluster's token")


def introduce(connection: FrameSocket, token: str, opening: object) -> None:
    """The connecting side, on a socket that blocks. Errors: Stranger, also for one that goes or says nothing."""
    with connection.patience(ANSWER_TIMEOUT_S):
        said = claim(token, _decoded(connection.receive(MAX_HANDSHAKE_BYTES), Challenge), opening)
        connection.send(said)
        check_confirmed(token, said, _decoded(connection.receive(MAX_HANDSHAKE_BYTES), Confirmed))


def meet(host: str, port: int, token: str, opening: object) -> FrameSocket:
    """A connection to somebody who knows the token, and has been told what this side is. Tries again where it was cut short: a
    busy machine may take longer to answer than a stranger is given. Errors: OSError if nobody listens there; Stranger."""
    for tries_left in reversed(range(TRIES)):
        connection = FrameSocket.connect(host, port)
        try:
            introduce(connection, token, opening)
        except Stranger:
            connection.close()
            if not tries_left:
                raise
            time.sleep(PAUSE_S)
        else:
            return connection
    raise AssertionError("the last try raises")


def identify(connection: FrameSocket, token: str, kind: type[T]) -> T:
    """The accepting side, on a socket that blocks: the opening. Errors: Stranger, also for one that goes or says nothing."""
    with connection.patience(HANDSHAKE_TIMEOUT_S):
        asked = challenge()
        connection.send(asked)
        said = _decoded(connection.receive(MAX_HANDSHAKE_BYTES), Claim)
        answer, opening = confirm(token, asked, said), _decoded(said.opening, kind)
        connection.send(answer)
    return opening


async def identify_stream(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str, kind: type[T]
) -> T:
    """The accepting side, in an event loop: the opening. Errors: Stranger, also for one that goes or says nothing."""
    asked = challenge()
    write_frame(writer, asked)
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            said = _decoded(await read_frame(reader, MAX_HANDSHAKE_BYTES), Claim)
    except TimeoutError:
        raise Stranger("it says nothing") from None
    answer, opening = confirm(token, asked, said), _decoded(said.opening, kind)
    write_frame(writer, answer)
    return opening


def _decoded(payload: bytes | None, kind: type[T]) -> T:
    if payload is None:
        raise Stranger("it has gone, says nothing, or too much")
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except msgspec.DecodeError as error:
        raise Stranger(f"it does not speak the protocol: {error}") from error


def _prove(token: str, *parts: bytes) -> bytes:
    return hmac.digest(token.encode(), b"".join(len(part).to_bytes(4, "little") + part for part in parts), "sha256")

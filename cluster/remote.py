"""A front end's stream to the scheduler of a Ray cluster: requests out, tokens in, over one socket that stays open.

Imports `scheduler.protocol.wire` and `scheduler.protocol.messages`; no Ray.
"""

import logging
import queue
import threading
import time
from collections.abc import Sequence
from itertools import groupby

import msgspec

from cluster.engine import EngineError, OnDeltas, OnFailure
from scheduler.protocol.handshake import ANSWER_TIMEOUT_S, Stranger, meet
from scheduler.protocol.messages import Abort, Alive, Connect, Deltas, Request, Stop, TalliedMetric, Tally, ToFrontEnd, Welcome
from scheduler.protocol.silence import BEAT_S, LOOK_S, Silence

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 5.0
SUBMIT_BYTES = 8 << 20
"""Of requests that travel as one message: far below what a frame may have, so that one may be as large as a model allows."""


class EncodedSubmit(msgspec.Struct, frozen=True, array_like=True, tag=11, gc=False):
    """`messages.Submit`, its requests already encoded: what cannot be is its caller's error, and nobody else's."""

    requests: tuple[msgspec.Raw, ...]


Outgoing = EncodedSubmit | Abort | Stop | Tally | Alive
FROM_SCHEDULER: type[ToFrontEnd] = ToFrontEnd  # type: ignore[assignment]  # a union is not a type to mypy
SCHEDULER = 0


class SchedulerStream:
    """Connected from its birth. on_deltas and on_failure are called from its own reading thread; a
    thread of its own writes, so that no caller waits for the socket. A third says that this process lives, and leaves a
    scheduler that does not say so.

    Errors: OSError if the scheduler cannot be reached, EngineError if it refuses the token.
    """

    def __init__(self, host: str, port: int, token: str, on_deltas: OnDeltas, on_failure: OnFailure) -> None:
        try:
            self._socket = meet(host, port, token, Connect())
        except Stranger as error:
            raise EngineError("the scheduler refused the connection: the token is that of another cluster") from error
        with self._socket.patience(ANSWER_TIMEOUT_S):
            welcome = self._socket.receive()
        if welcome is None:
            raise ConnectionError("the scheduler has gone, or says nothing")
        said = msgspec.msgpack.decode(welcome, type=Welcome)
        self.block_size, self._hung_after_s = said.block_size, said.hung_after_s
        self._silence = Silence(time.monotonic())
        self._silence.heard(SCHEDULER, time.monotonic())
        self._left = threading.Event()
        self._on_deltas = on_deltas
        self._on_failure = on_failure
        self._failure: str | None = None
        self._outgoing: queue.SimpleQueue[Outgoing | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._read, name="manta-front-end-reader", daemon=True),
            threading.Thread(target=self._write, name="manta-front-end-writer", daemon=True),
            threading.Thread(target=self._beat, name="manta-front-end-heart", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Errors: EngineError when the scheduler has gone; ValueError for what cannot be sent, and nothing is then."""
        try:
            encoded = tuple(msgspec.Raw(msgspec.msgpack.encode(request)) for request in requests)
        except (OverflowError, UnicodeEncodeError) as error:
            raise ValueError(f"the request cannot be sent to the scheduler: {error}") from error
        self._send(EncodedSubmit(encoded))

    def abort(self, streams: Sequence[int]) -> None:
        self._tell(Abort(tuple(streams)))

    def stop(self, stream: int, keep_tokens: int) -> None:
        self._tell(Stop(stream, keep_tokens))

    def tally(self, metrics: Sequence[TalliedMetric]) -> None:
        """Errors: EngineError when the scheduler has gone."""
        self._send(Tally(tuple(metrics)))

    def fail(self, reason: str) -> None:
        """Ends the stream for a reason that others have found. The first reason is the one that is told."""
        self._failure = self._failure or reason
        self._left.set()
        self._socket.close()
        self._outgoing.put(None)

    def leave(self) -> None:
        self.close()

    def close(self) -> None:
        """Ends the stream; nobody is told."""
        self.fail("")
        for thread in self._threads:
            if threading.current_thread() is not thread:
                thread.join(timeout=JOIN_TIMEOUT_S)

    def _send(self, message: Outgoing) -> None:
        if self._failure is not None:
            raise EngineError(self._failure or "the stream to the scheduler was closed")
        self._outgoing.put(message)

    def _tell(self, message: Abort | Stop) -> None:
        """What concerns streams that end anyway if the scheduler has gone."""
        if self._failure is None:
            self._outgoing.put(message)

    def _write(self) -> None:
        """One batch under way: what is asked for while it is being written goes with the next. No window, no waiting."""
        while (message := self._outgoing.get()) is not None:
            waiting = [message]
            while not self._outgoing.empty() and (message := self._outgoing.get()) is not None:
                waiting.append(message)
            try:
                for batch in merged(waiting):
                    self._socket.send(batch)
            except Exception as error:  # what has been taken from the queue is lost, and so is the stream
                if not isinstance(error, OSError):
                    logger.exception("a message cannot be sent to the scheduler")
                self._socket.close()  # wakes the reading thread, which tells
                return
            if message is None:
                return

    def _beat(self) -> None:
        said_s = 0.0
        while not self._left.wait(LOOK_S):
            now_s = time.monotonic()
            silent_s = self._silence.look(now_s)[SCHEDULER]
            if silent_s > self._hung_after_s:
                self.fail(f"the scheduler has said nothing for {silent_s:.1f} s")
            elif now_s - said_s >= BEAT_S:
                said_s = now_s
                self._outgoing.put(Alive())

    def _read(self) -> None:
        for message in self._socket.messages(FROM_SCHEDULER):
            self._silence.heard(SCHEDULER, time.monotonic())
            if isinstance(message, Deltas):
                self._on_deltas(message)
        self._left.set()
        reason = "the scheduler has gone" if self._failure is None else self._failure
        self._failure = reason
        self._outgoing.put(None)
        if reason:
            self._on_failure(reason)


def merged(messages: Sequence[Outgoing]) -> list[Outgoing]:
    """The same messages in the same order; submissions that follow each other travel as one, up to `SUBMIT_BYTES`."""
    batches: list[Outgoing] = []
    for submits, run in groupby(messages, key=lambda message: isinstance(message, EncodedSubmit)):
        if submits:
            submissions = (message for message in run if isinstance(message, EncodedSubmit))
            batches += _parts([request for message in submissions for request in message.requests])
        else:
            batches += run
    return batches


def _parts(requests: Sequence[msgspec.Raw]) -> list[EncodedSubmit]:
    parts: list[EncodedSubmit] = []
    begin = size = 0
    for at, request in enumerate(requests):
        more = len(memoryview(request))
        if at > begin and size + more > SUBMIT_BYTES:
            parts.append(EncodedSubmit(tuple(requests[begin:at])))
            begin, size = at, 0
        size += more
    return [*parts, EncodedSubmit(tuple(requests[begin:]))]

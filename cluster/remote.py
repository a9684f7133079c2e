"""A front end's stream to the scheduler of a Ray cluster: requests out, tokens in, over one socket that stays open.

Imports `scheduler.wire` and `scheduler.messages`; no Ray.
"""

import threading
from collections.abc import Sequence

import msgspec

from cluster.engine import EngineError, OnDeltas, OnFailure
from scheduler.messages import Abort, Connect, Deltas, FromFrontEnd, Request, Stop, Submit, TalliedMetric, Tally, Welcome
from scheduler.wire import FrameSocket


class SchedulerStream:
    """Connected from its birth. on_deltas and on_failure are called from its own reading thread.

    Errors: OSError if the scheduler cannot be reached, EngineError if it refuses the token.
    """

    def __init__(self, host: str, port: int, token: str, on_deltas: OnDeltas, on_failure: OnFailure) -> None:
        self._socket = FrameSocket.connect(host, port)
        self._socket.send(Connect(token))
        welcome = self._socket.receive()
        if welcome is None:
            raise EngineError("the scheduler refused the connection: the token is that of another cluster")
        self.page_size = msgspec.msgpack.decode(welcome, type=Welcome).page_size
        self._on_deltas = on_deltas
        self._on_failure = on_failure
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._read, name="manta-front-end-stream", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Errors: EngineError when the scheduler has gone."""
        self._send(Submit(tuple(requests)))

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
        self._socket.close()

    def close(self) -> None:
        """Ends the stream; nobody is told."""
        self.fail("")
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5.0)

    def _send(self, message: FromFrontEnd) -> None:
        try:
            self._socket.send(message)
        except OSError as error:
            raise EngineError(self._failure or f"the scheduler has gone: {error}") from error

    def _tell(self, message: Abort | Stop) -> None:
        """What concerns streams that end anyway if the scheduler has gone."""
        try:
            self._send(message)
        except EngineError:
            return

    def _read(self) -> None:
        decoder = msgspec.msgpack.Decoder(Deltas)
        while (payload := self._socket.receive()) is not None:
            self._on_deltas(decoder.decode(payload))
        reason = "the scheduler has gone" if self._failure is None else self._failure
        self._failure = reason
        if reason:
            self._on_failure(reason)

"""Server-sent events: framing, and a response that streams them. Imports starlette and msgspec; nothing of the engine."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deploy.doors.openai.errors import error_body
from deploy.doors.openai.exchanging import ClientGone, unless_gone
from deploy.doors.warnings import Warnings
from deploy.frontend.errors import Fault, RequestError

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
COMMENT = b": nothing new yet\n\n"
"""What readers of event streams pass over, as their standard says: a ping."""

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""Proxies shall neither keep a stream nor hold it back."""

PING_S = 15.0
"""Proxies end connections on which nothing has come for a minute, many of them."""

_encoder = msgspec.json.Encoder()


def event(content: msgspec.Struct, id: bytes = b"", name: str = "") -> bytes:
    """One event. JSON has no line breaks of its own, so it is one `data` line. name: of its kind, where kinds have some."""
    data = b"data: " + _encoder.encode(content) + b"\n\n"
    if id:
        data = b"id: " + id + b"\n" + data
    return b"event: " + name.encode() + b"\n" + data if name else data


def failure(error: RequestError) -> bytes:
    """The event that ends a stream which failed."""
    return b"data: " + error_body(error) + b"\n\n"


class EventStream(Response):
    """Sends events as they come, then `end`.

    Headers wait for the first event: what fails before it has the status of its error. What fails after it becomes the last
    events, as `failed` says it. Everything happens in one task, which a disconnect cancels, so that `events` ends at once.
    Beside it a `ping`, if there is one, goes out whenever nothing else has for `PING_S`: nobody takes the connection for dead.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], warnings: Warnings, failed: Callable[[RequestError], bytes] = failure,
        end: bytes = DONE, ping: bytes = b"",
    ) -> None:  # fmt: skip
        self.status_code = 200
        self.background = None
        self._events = events
        self._warnings = warnings
        self._failed = failed
        self._end = end
        self._ping = ping
        self._quiet = False  # nothing has been sent for a while

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        with contextlib.suppress(ClientGone):
            await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async def body(data: bytes, more: bool = True) -> None:
            self._quiet = False
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async with contextlib.aclosing(self._events) as events:
            first = await anext(events, b"")
            self.init_headers(HEADERS | self._warnings.headers())
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if first:
                await body(first)
            try:
                async with self._pinging(body):
                    async for data in events:
                        await body(data)
            except RequestError as error:
                await body(self._failed(error))
            except Exception:
                logger.exception("a stream failed")
                await body(self._failed(RequestError(Fault.INTERNAL, "the server failed: its log has the reason")))
        await body(self._end, more=False)

    @contextlib.asynccontextmanager
    async def _pinging(self, body: Callable[[bytes], Awaitable[None]]) -> AsyncGenerator[None, None]:
        """While the block runs."""

        async def ping() -> None:
            while True:
                self._quiet = True
                await asyncio.sleep(PING_S)
                if self._quiet:
                    await body(self._ping)

        pinging = asyncio.create_task(ping()) if self._ping else None
        try:
            yield
        finally:
            if pinging is not None:
                pinging.cancel()
                await asyncio.gather(pinging, return_exceptions=True)

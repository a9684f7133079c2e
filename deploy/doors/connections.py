"""What a client may hold open: how long its requests take to arrive, and how many connections come from one address.

    headers      `BoundedProtocol`, a uvicorn protocol, since no option of uvicorn bounds them; HAProxy by its own
    bodies       `entrance.Gatekeeper`, in front of every handler, whoever the server is
    connections  `BoundedProtocol`, HAProxy; gRPC knows calls alone, so there `BoundedCalls` counts those

Imports uvicorn, grpc and the door's errors.
"""

import asyncio
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import httptools
from starlette.middleware import Middleware
from uvicorn import config as uvicorn_config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from deploy.config.load import connection_bounds
from deploy.config.serve import ServeConfig
from deploy.frontend.errors import Fault, RequestError

MOST_HEAD_BYTES, MOST_HEADERS = 16 << 10, 128
"""Of one request, its first line included: what HAProxy lets through, and what it adds to that."""

Handler = Any
"""grpc.RpcMethodHandler, of which grpc has no types."""


class BoundedProtocol(HttpToolsProtocol):
    """What uvicorn speaks: HTTP/1.1, within `bounds`. Headers arrive within `receive_timeout_s` of the connection, or of the
    next request's first byte; who sends nothing more is told by uvicorn's own `timeout_keep_alive`."""

    bounds: ServeConfig
    addresses: Counter[str]
    """How many each address has open with one server."""

    _late: asyncio.TimerHandle | None = None  # until the headers are there
    _begun = 0  # requests
    _head_bytes = 0  # of one that have come in parts
    _excess = False
    _address: str | None = None  # while it is counted

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.parser = PlainParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._address, most = self.client[0] if self.client else "", self.bounds.max_connections
        self.addresses[self._address] += 1
        if self.addresses[self._address] > most:
            self._refuse(b"503 Service Unavailable", f"{most} connections of this address are open: close some")
        else:
            self._await_headers()

    def data_received(self, data: bytes) -> None:
        before = self._begun
        super().data_received(data)
        if self._late is None or self._begun != before:
            return
        self._head_bytes += len(data)  # all of it is of one head, which the parser keeps
        if self._head_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
            self._refuse_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun += 1
        self._head_bytes = 0
        self._await_headers()

    def on_headers_complete(self) -> None:
        if self.declines():
            return
        self._cancel()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MOST_HEAD_BYTES or len(self.headers) > MOST_HEADERS:
            self._excess = True
            raise ValueError("the head is too large")  # the parser reads no further
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.declines():
            super().on_message_complete()

    def declines(self) -> bool:
        """Whether the request that is being read offers a protocol that is not spoken here."""
        return self.parser.should_upgrade() and not self._should_upgrade()

    def head_again(self) -> bytes:
        """Of the request that has just been read, without the offer."""
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%s: %s" % header for header in self.headers if header[0] not in (b"upgrade", b"connection")]
        return b"\r\n".join([*lines, b"", b""])

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self) -> None:
        self._leave()  # another protocol takes the connection over
        super().handle_websocket_upgrade()

    def send_400_response(self, msg: str) -> None:
        if self._excess:
            self._refuse_head()
        else:
            super().send_400_response(msg)

    def _refuse_head(self) -> None:
        said = f"the request has more than {MOST_HEADERS} headers, or {MOST_HEAD_BYTES} bytes of them: send fewer"
        self._refuse(b"431 Request Header Fields Too Large", said)

    def _leave(self) -> None:
        self._cancel()
        if self._address is not None:
            _count_off(self.addresses, self._address)
            self._address = None

    def _await_headers(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(self.bounds.receive_timeout_s, self._give_up)

    def _cancel(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._await_headers()  # an answer is under way: its client has begun another request too early
        else:
            self._refuse(b"408 Request Timeout", too_slow("headers", self.bounds.receive_timeout_s).message)

    def _refuse(self, status: bytes, said: str) -> None:
        text = said.encode()
        head = b"HTTP/1.1 %s\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (status, len(text)) + text)
        self.transport.close()


class PlainParser(httptools.HttpRequestParser):
    """Reads the body behind an offer of another protocol, as Java's clients and `curl --http2` make it with every first request
    (`Upgrade: h2c`): httptools takes the body for that protocol's, and uvicorn drops it. Who offers has to be content with
    HTTP/1.1, so the request is read again as one without the offer."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        super().__init__(protocol)
        self._protocol = protocol

    def feed_data(self, data: "bytes | bytearray | memoryview[int] | array[int]") -> None:
        try:
            super().feed_data(data)
        except httptools.HttpParserUpgrade as offered:
            if self.get_method() == b"CONNECT":  # not an offer: this is no proxy
                raise httptools.HttpParserError("CONNECT") from None
            if not self._protocol.declines():
                raise
            self.feed_data(self._protocol.head_again() + bytes(data[offered.args[0] :]))


def bounded_protocol(config: ServeConfig) -> type[HttpToolsProtocol]:
    """Of one server, whose connections it counts."""

    class Bounded(BoundedProtocol):
        bounds, addresses = config, Counter[str]()

    return Bounded


def bound_serve() -> list[Middleware]:
    """Ray Serve calls it in each process that listens for HTTP, its proxies and the front ends behind HAProxy, before it starts
    uvicorn there: its RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH. Serve has no option for what uvicorn speaks, so this changes
    what uvicorn takes for its own choice. Returns what Serve asks for: further middleware, none."""
    uvicorn_config.HTTP_PROTOCOLS["auto"] = bounded_protocol(connection_bounds())  # type: ignore[assignment]
    return []


class BoundedCalls(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Calls whose message has not arrived within `receive_timeout_s` end, and so do those beyond `max_connections` of one
    address. gRPC reads the message before it calls a method, for as long as that takes; so each method becomes one that reads
    a stream, which looks the same from outside."""

    def __init__(self, config: ServeConfig, address_of: Callable[[str], str]) -> None:
        """address_of: from gRPC's name of a client."""
        self._config = config
        self._address_of = address_of
        self._calls: Counter[str] = Counter()

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Handler]], details: Any) -> Handler:
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        names = {"request_deserializer": handler.request_deserializer, "response_serializer": handler.response_serializer}
        if handler.response_streaming:

            async def stream(messages: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
                with self._counted(await self._admitted(context)):
                    request = await self._first(messages, context)
                    async for response in handler.unary_stream(request, context):
                        yield response

            return grpc.stream_stream_rpc_method_handler(stream, **names)

        async def answer(messages: AsyncIterator[Any], context: Any) -> Any:
            with self._counted(await self._admitted(context)):
                return await handler.unary_unary(await self._first(messages, context), context)

        return grpc.stream_unary_rpc_method_handler(answer, **names)

    async def _admitted(self, context: Any) -> str:
        address, most = self._address_of(context.peer()), self._config.max_connections
        if self._calls[address] >= most:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{most} calls of this address are under way: end some")
        return address

    @contextmanager
    def _counted(self, address: str) -> Iterator[None]:
        self._calls[address] += 1
        try:
            yield
        finally:
            _count_off(self._calls, address)

    async def _first(self, messages: AsyncIterator[Any], context: Any) -> Any:
        timeout_s = self._config.receive_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await anext(aiter(messages))
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, too_slow("message", timeout_s).message)
        except StopAsyncIteration:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")


def _count_off(counts: Counter[str], address: str) -> None:
    counts[address] -= 1
    if not counts[address]:
        del counts[address]


def too_slow(part: str, timeout_s: float) -> RequestError:
    said = f"the request's {part} did not arrive within {timeout_s:g} s: send it faster"
    return RequestError(Fault.TOO_SLOW, f"{said}, or let the server wait longer (receive_timeout_s)")

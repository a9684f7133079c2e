"""What a client may hold open: requests that do not arrive, and connections."""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from ray._common.utils import import_attr
from ray.serve._private.http_util import validate_http_proxy_callback_return
from starlette.responses import PlainTextResponse

from deploy.config.load import UNCOUNTED, choose_proxy, connection_bounds
from deploy.config.serve import ServeConfig
from deploy.doors.connections import MOST_HEAD_BYTES, MOST_HEADERS
from deploy.frontend.service.service import Service
from tests.deploy.doors.http.conftest import MODEL, PATIENCE_S, Host

SOON_S = 0.5
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"


@pytest.fixture(scope="module")
def impatient(host: Host, service: Service) -> str:
    return host.serve(service, ServeConfig(receive_timeout_s=SOON_S))


@contextlib.contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    where = urlsplit(url)
    with socket.create_connection((where.hostname or "", where.port or 0), timeout=PATIENCE_S) as connection:
        yield connection


def to_the_end(connection: socket.socket, drip: bytes = b"") -> bytes:
    """What the server says until it closes the connection. drip: sent again and again meanwhile."""
    said, deadline_s = b"", time.monotonic() + PATIENCE_S
    connection.settimeout(SOON_S / 10 if drip else PATIENCE_S)
    while True:
        with contextlib.suppress(TimeoutError):
            try:
                received = connection.recv(4096)
            except ConnectionError:
                return said
            if not received:
                return said
            said += received
            continue
        assert time.monotonic() < deadline_s, "the connection stays open"
        with contextlib.suppress(ConnectionError):
            connection.sendall(drip)


@pytest.mark.parametrize("drip", [b"", b"x"])
@pytest.mark.parametrize("sent", [b"GET /hea", b"GET /health HTTP/1.1\r\nho"])
def test_headers_that_do_not_arrive_are_not_waited_for(impatient: str, sent: bytes, drip: bytes) -> None:
    with connected(impatient) as connection:
        connection.sendall(sent)
        said = to_the_end(connection, drip)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b"headers did not arrive within 0.5 s" in said


def test_nor_is_a_request_that_never_begins(impatient: str) -> None:
    with connected(impatient) as connection:
        assert to_the_end(connection).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("drip", [b"", b" "])
def test_a_body_that_does_not_arrive_is_not_waited_for(impatient: str, drip: bytes) -> None:
    with connected(impatient) as connection:
        connection.sendall(HEAD + b'{"model"')
        said = to_the_end(connection, drip)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b'"type":"timeout_error"' in said
    assert b"body did not arrive within 0.5 s" in said


LINES = [b"GET /health HTTP/1.1", b"host: here"]
TOO_LARGE = (
    [b"GET /health?" + b"x" * MOST_HEAD_BYTES + b" HTTP/1.1", b"host: here"],
    [*LINES, b"x: " + b"y" * MOST_HEAD_BYTES],
    [*LINES, *(b"x-%d: y" % at for at in range(MOST_HEADERS))],
)


@pytest.mark.parametrize("lines", TOO_LARGE)
@pytest.mark.parametrize("more", [b"", b"content-length: 3\r\n\r\nabc"])
def test_a_head_that_is_too_large_is_refused(address: str, lines: list[bytes], more: bytes) -> None:
    with connected(address) as connection:
        connection.sendall(b"\r\n".join(lines) + b"\r\n" + (more or b"\r\n"))
        said = to_the_end(connection)
    assert said.startswith(b"HTTP/1.1 431 ")
    assert b"more than 128 headers, or 16384 bytes of them" in said


@pytest.mark.parametrize("sent", [b"GET /" + b"x" * 100, b"GET /health HTTP/1.1\r\nhost: here\r\nx: "])
def test_nor_is_it_kept_until_it_has_ended(address: str, sent: bytes) -> None:
    with connected(address) as connection:
        connection.sendall(sent)
        said = to_the_end(connection, b"x" * 5000)
    assert said.startswith(b"HTTP/1.1 431 ")


def test_heads_within_the_bounds_are_taken_however_many_and_in_whatever_parts(address: str) -> None:
    large = b"\r\n".join([*LINES, b"x: " + b"y" * 15_000, *(b"x-%d: y" % at for at in range(MOST_HEADERS - 2)), b"", b""])
    assert len(large) > 15_000
    with connected(address) as connection:
        for _ in range(3):  # of one connection
            for at in range(0, len(large), 4000):
                connection.sendall(large[at : at + 4000])
                time.sleep(0.01)
            said = b""
            while not said.endswith(b"}"):  # the whole of one answer, however it is cut
                received = connection.recv(4096)
                assert received, "the connection has ended"
                said += received
            assert said.startswith(b"HTTP/1.1 200 ")
    body = b'{"tokens": [%s]}' % b", ".join([b"72"] * 20_000)
    with connected(address) as connection:  # of a body nothing counts
        connection.sendall(DETOKENIZE + b"content-length: %d\r\n\r\n" % len(body))
        for at in range(0, len(body), 4000):
            connection.sendall(body[at : at + 4000])
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_who_goes_away_in_a_body_is_no_fault(address: str, caplog: pytest.LogCaptureFixture) -> None:
    """It was a traceback of 40 lines."""
    log = logging.getLogger("uvicorn.error")
    log.addHandler(caplog.handler)
    try:
        for _ in range(3):
            with connected(address) as connection:
                connection.sendall(HEAD + b'{"model"')
        assert httpx.get(f"{address}/health", timeout=PATIENCE_S).status_code == 200
    finally:
        log.removeHandler(caplog.handler)
    assert caplog.messages == []


OFFER = b"upgrade: h2c\r\nconnection: Upgrade, HTTP2-Settings\r\nhttp2-settings: AAMAAABk\r\n"
BODY = b'{"tokens": [72, 73]}'
DETOKENIZE = b"POST /detokenize HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    "body",
    [
        b"content-length: 20\r\n\r\n" + BODY,
        b"transfer-encoding: chunked\r\n\r\n14\r\n%s\r\n0\r\n\r\n" % BODY,
    ],
)
@pytest.mark.parametrize("piece", [1 << 16, 7])
def test_an_offer_of_another_protocol_changes_nothing(address: str, body: bytes, piece: int) -> None:
    """As Java's client makes one with every first request; its body was dropped, and the request a 400."""
    sent = DETOKENIZE + OFFER + body + b"GET /health HTTP/1.1\r\nhost: here\r\n" + OFFER.replace(b"h2c", b"websocket") + b"\r\n"
    sent += DETOKENIZE + b"connection: close\r\n" + body
    with connected(address) as connection:
        for at in range(0, len(sent), piece):
            connection.sendall(sent[at : at + piece])
        said = to_the_end(connection)
    assert said.count(b"HTTP/1.1 200 OK") == 3, said
    assert said.count(b'{"prompt":') == 2, said


def test_to_be_a_proxy_is_no_offer(address: str) -> None:
    with connected(address) as connection:
        connection.sendall(b"CONNECT there:443 HTTP/1.1\r\nhost: there\r\n\r\n")
        assert to_the_end(connection).startswith(b"HTTP/1.1 400 ")


@pytest.mark.slow
def test_who_is_quick_takes_its_time_between_requests(host: Host, service: Service) -> None:
    """And an answer may take longer than its request."""
    url = host.serve(service, ServeConfig(receive_timeout_s=2 * SOON_S))  # time to be quick, on busy cores too
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        assert client.get("/health").status_code == 200
        time.sleep(4 * SOON_S)
        asked = {"model": MODEL, "prompt": "a", "max_tokens": 600, "ignore_eos": True}
        answer = client.post("/v1/completions", json=asked)
        assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 600)


def test_one_address_has_so_many_connections(host: Host, service: Service) -> None:
    url = host.serve(service, ServeConfig(max_connections=3))
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(url)) for _ in range(3)]
        with connected(url) as one_more:
            said = to_the_end(one_more)
        assert said.startswith(b"HTTP/1.1 503 ")
        assert b"3 connections of this address are open" in said
        held[0].close()
        deadline_s = time.monotonic() + PATIENCE_S
        while httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code != 200:
            assert time.monotonic() < deadline_s, "who has gone is still counted"


def test_ray_serves_processes_are_bounded_by_the_environment(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """They make uvicorn's configuration themselves, and let it choose its protocol."""
    environ: dict[str, str] = {}
    choose_proxy(ServeConfig(haproxy=False, receive_timeout_s=SOON_S, max_connections=2), environ)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", uvicorn.config.HTTP_PROTOCOLS["auto"])
    bind = import_attr(environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"])
    assert validate_http_proxy_callback_return(bind()) == []
    with serving(host, uvicorn.Config(PlainTextResponse("here"), log_level="warning", lifespan="off")) as url:
        with connected(url) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nho")
            assert to_the_end(connection).startswith(b"HTTP/1.1 408 ")
        with connected(url), connected(url), connected(url) as one_more:
            assert to_the_end(one_more).startswith(b"HTTP/1.1 503 ")


def test_behind_haproxy_it_counts_and_the_front_ends_do_not() -> None:
    environ: dict[str, str] = {}
    choose_proxy(ServeConfig(receive_timeout_s=1.5, request_timeout_s=300.0, max_connections=2), environ)
    bounds = connection_bounds(environ)
    assert (bounds.receive_timeout_s, bounds.max_connections) == (1.5, UNCOUNTED)
    assert environ["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"] == "2"
    assert float(environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"]) >= 30, "a proxy that comes up on busy cores is killed"
    assert environ["RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS"] == "1", "one that is stopped keeps its streams for its grace"
    assert environ["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] == "422", "what is under way at a change of its configuration ends"
    assert connection_bounds({}).receive_timeout_s == ServeConfig().receive_timeout_s


@contextlib.contextmanager
def serving(host: Host, config: uvicorn.Config) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(config)
    running = asyncio.run_coroutine_threadsafe(server.serve(sockets=[listener]), host.loop)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    running.result(PATIENCE_S)

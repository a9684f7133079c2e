"""Ports: what is taken is named before anything is loaded, and nothing is ready before it answers."""

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from deploy.config.load import ConfigError, proxy_ports
from deploy.config.serve import ServeConfig
from deploy.serving.ports import IN_A_ROW, await_answer, check_free, reserve

HOST = "127.0.0.1"


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server((HOST, 0)) as listener:
        yield listener.getsockname()[1]


def free() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("ports", [{"port": 0}, {"grpc_port": 0}])
def test_proxies_have_to_be_told_a_port(ports: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"port 0: .*--local alone"):
        check_free(ServeConfig(**ports))  # type: ignore[arg-type]


def test_a_taken_port_is_named(taken: int) -> None:
    with pytest.raises(ConfigError, match=f"port {taken} on {HOST}, for HTTP, .*choose another with --port"):
        check_free(ServeConfig(port=taken, haproxy=False))


def test_a_port_of_haproxys_is_named_with_the_variable_that_moves_it(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.config.load.os.environ", {})
    assert proxy_ports(ServeConfig(), {})["HAProxy's page"] == ("RAY_SERVE_HAPROXY_STATS_PORT", 8404)
    assert proxy_ports(ServeConfig(haproxy=False), {}) == {}
    assert "gRPC" not in " ".join(proxy_ports(ServeConfig(), {}))
    assert "gRPC" in " ".join(proxy_ports(ServeConfig(grpc_port=9000), {}))
    monkeypatch.undo()
    for variable in ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"):
        monkeypatch.setenv(variable, "0")
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", str(taken))
    with pytest.raises(ConfigError, match=f"port {taken} .*for HAProxy's page.*RAY_SERVE_HAPROXY_STATS_PORT"):
        check_free(ServeConfig(port=free()))


def test_a_reserved_port_refuses_clients_until_it_listens() -> None:
    with reserve(HOST, 0, "for HTTP", "") as bound:
        host, port = bound.getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, port))
        bound.listen()
        with pytest.raises(ConfigError, match="for gRPC"):
            reserve(host, port, "for gRPC", "")
        socket.create_connection((host, port)).close()


def test_a_host_that_is_not_ours_is_named() -> None:
    with pytest.raises(ConfigError, match="host='no such host'"):
        reserve("no such host", 0, "for HTTP", "")


class Models(BaseHTTPRequestHandler):
    """What an endpoint of the model `ours` says, at first not at all, and then not always."""

    asked = 0
    unready = (1, 2, 5)

    def do_GET(self) -> None:
        type(self).asked += 1
        body = json.dumps({"data": [{"id": "ours"}]}).encode()
        meant = self.path == "/below/v1/models" and self.headers["Authorization"] == "Bearer key"
        ready = meant and type(self).asked not in self.unready
        self.send_response(200 if ready else 503)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def endpoint() -> Iterator[ServeConfig]:
    Models.asked = 0
    with HTTPServer((HOST, 0), Models) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield ServeConfig(host="0.0.0.0", port=server.server_port, route_prefix="/below")
        server.shutdown()


def test_it_waits_for_an_answer_through_the_very_url(endpoint: ServeConfig) -> None:
    waits: list[int] = []
    await_answer(endpoint, "ours", "key", 60.0, lambda: waits.append(1))
    assert len(waits) == len(Models.unready)
    assert Models.asked == max(Models.unready) + IN_A_ROW, "another HAProxy may not know the way yet"


@pytest.mark.parametrize(("model", "port", "seen"), [("theirs", None, "another server's answer"), ("ours", 1, "refused")])
def test_what_answers_instead_is_told(endpoint: ServeConfig, model: str, port: int | None, seen: str) -> None:
    Models.asked = max(Models.unready)
    asked = replace(endpoint, port=port or endpoint.port)
    with pytest.raises(TimeoutError, match=f"(?s){endpoint.base_url if port is None else ':1/below'}.*{seen}"):
        await_answer(asked, model, "key", 1.0, lambda: None)


def test_whoever_is_let_in_by_a_reserved_port_is_answered_at_once() -> None:
    """asyncio sets TCP_NODELAY only where a socket says that it is TCP's; each answer took 40 ms, till the client's ACK."""
    with reserve(HOST, 0, "for HTTP", "") as bound:
        assert bound.proto == socket.IPPROTO_TCP

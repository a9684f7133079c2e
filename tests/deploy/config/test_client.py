"""HTTP clients beside proxies in the environment: none before this machine, and those that cannot be used are said."""

import asyncio
import io
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from rich.console import Console

from deploy.batch.backends.endpoint import open_endpoint
from deploy.batch.lines import Line, parse
from deploy.config.client import on_this_machine, open_client
from deploy.config.load import ConfigError
from deploy.observing.tracing import Tracer
from deploy.status.top import top
from tests.deploy.batch.jobs import as_lines, entry
from tests.shared.servers import QuietHandler, answering

NOWHERE = "127.0.0.1:9"
PROXIES = [
    {"ALL_PROXY": f"socks5://{NOWHERE}"},
    {"ALL_PROXY": f"socks://{NOWHERE}", "all_proxy": f"socks://{NOWHERE}"},
    {"HTTP_PROXY": f"http://{NOWHERE}", "http_proxy": f"http://{NOWHERE}"},
    {"no_proxy": "localhost,[::1],fd00::/8", "NO_PROXY": "localhost,[::1],fd00::/8"},
]


class Answers(QuietHandler):
    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.answer(b'{"usage": {"completion_tokens": 3}}')

    do_GET = do_POST = _answer


@pytest.mark.parametrize("proxies", PROXIES)
def test_no_proxy_stands_before_this_machine(proxies: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)

    async def ask(url: str) -> int:
        async with open_endpoint(url, None, 1) as backend:
            return (await backend.answer(parse(Line(1, as_lines([entry("a")]).strip(), 0), 1 << 20))).output_tokens

    with answering(Answers) as port:
        assert asyncio.run(ask(f"http://127.0.0.1:{port}")) == 3
        assert asyncio.run(ask(f"localhost:{port}/v1")) == 3
        with pytest.raises(ValueError, match="is not an endpoint of this version of Manta"):
            top(f"http://127.0.0.1:{port}", None, 1.0, once=True, console=Console(file=io.StringIO()))


@pytest.mark.parametrize("proxies", [PROXIES[0], PROXIES[1], PROXIES[3]])
def test_a_proxy_that_cannot_be_used_is_said(proxies: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"proxies that the environment names for http://far.* cannot be used \(.*unset"):
        open_client(httpx.Client, "http://far.example", None)


def test_an_endpoint_elsewhere_is_reached_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(Answers) as port:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        with open_client(httpx.Client, "http://far.example", None) as client:
            assert client.get("/health").json() == {"usage": {"completion_tokens": 3}}


def test_traces_reach_a_collector_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", f"socks5://{NOWHERE}")
    sessions: list[Any] = []

    def export(endpoint: str, session: Any) -> InMemorySpanExporter:
        sessions.append((endpoint, session))
        return InMemorySpanExporter()

    monkeypatch.setattr("deploy.observing.tracing.OTLPSpanExporter", export)
    with answering(Answers) as port:
        Tracer.to_collector(f"http://127.0.0.1:{port}", "tiny").close()
        [(endpoint, session)] = sessions
        assert session.post(endpoint, data=b"").status_code == 200
    Tracer.to_collector("http://collector.example:4318", "tiny").close()
    assert sessions[1][1].trust_env


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1", True), ("127.8.9.10", True), ("::1", True), ("::ffff:127.0.0.1", True),
        ("0.0.0.0", True), ("LOCALHOST", True), ("a.localhost.", True),
        ("127.evil.example", False), ("localhost.evil.example", False), ("::1234", False),
    ],
)  # fmt: skip
def test_what_is_this_machine(host: str, here: bool) -> None:
    assert on_this_machine(host) is here


@pytest.mark.parametrize("url", ["http://host:8000", "host:8000", "http://host:8000/", "host:8000/v1", "http://host:8000/v1/"])
def test_the_address_for_clients_of_openai_s_api_will_do(url: str) -> None:
    with open_client(httpx.Client, url, None) as client:
        assert client.build_request("GET", "/status.json").url == "http://host:8000/status.json"


@pytest.mark.parametrize("url", ["ftp://there", "http://", "http://[::1", "http://host:port"])
def test_what_is_no_address_is_said(url: str) -> None:
    with pytest.raises(ConfigError, match=r"is no address of an endpoint .*give one like http"):
        open_client(httpx.Client, url, None)

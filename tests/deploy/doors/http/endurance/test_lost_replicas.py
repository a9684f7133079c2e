"""A replica is killed in mid-stream: its clients go on through another one. Two replicas in processes of their own, on one
scheduler and a group with a real model."""

import contextlib
import runpy
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import httpx
import pytest

from tests.deploy.frontend.mortal_cluster import HOST, PATIENCE_S, MortalCluster, until

ROOT = Path(__file__).parents[5]
stream = runpy.run_path(str(ROOT / "examples" / "resume_stream.py"))["stream"]
"""What the documentation shows."""

CUT_AFTER = 4
"""Events."""
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "def add(a, b):\n", "temperature": 0}),
    ("/v1/completions", {"prompt": "def sub(a, b):\n", "temperature": 1.0, "seed": 3, "n": 3, "logprobs": 1}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Say hello."}], "temperature": 0.9, "seed": 4}),
    ("/v1/completions", {"prompt": "class A:", "temperature": 1.1, "seed": 5, "presence_penalty": 0.4}),
]


class Replica:
    """One process."""

    def __init__(self, scheduler: int) -> None:
        command = [sys.executable, "-m", "tests.deploy.doors.http.endurance.replica", str(scheduler)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    @property
    def address(self) -> str:
        assert self._process.stdout is not None
        return f"http://{HOST}:{int(self._process.stdout.readline())}"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE_S)


@pytest.fixture
def cluster() -> Iterator[MortalCluster]:
    with contextlib.closing(MortalCluster()) as opened:
        yield opened


class Elsewhere(httpx.BaseTransport):
    """What stands before the replicas: from when one has died, requests go to another."""

    def __init__(self, addresses: list[str]) -> None:
        self.resumed = 0
        self._addresses = addresses
        self._transport = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.resumed += "Last-Event-ID" in request.headers
        request.url = httpx.URL(self._addresses[0]).join(request.url.raw_path.decode())
        return self._transport.handle_request(request)


def texts(events: list[dict[str, Any]]) -> dict[int, tuple[str, list[str | None], list[Any]]]:
    """By choice: its text, its ends, its log-probabilities' tokens."""
    told: dict[int, tuple[str, list[str | None], list[Any]]] = {}
    for event in events:
        for choice in event["choices"]:
            text, ends, tokens = told.get(choice["index"], ("", [], []))
            new = choice.get("text") or choice.get("delta", {}).get("content") or ""
            ends = [*ends, choice["finish_reason"]] if choice["finish_reason"] else ends
            tokens = [*tokens, *choice["logprobs"]["tokens"]] if choice.get("logprobs") else tokens
            told[choice["index"]] = (text + new, ends, tokens)
    return told


@pytest.mark.slow
def test_streams_go_on_through_another_replica(cluster: MortalCluster) -> None:
    first, second = Replica(cluster.life.port), Replica(cluster.life.port)
    try:
        addresses = [first.address, second.address]
        transport = Elsewhere(addresses)
        with httpx.Client(transport=transport, base_url="http://manta", timeout=PATIENCE_S) as client:
            bodies = [(path, body | {"max_tokens": 90, "ignore_eos": True}) for path, body in ASKED]
            expected = [texts(list(stream(client, path, body))) for path, body in bodies]

            def lose_the_first() -> None:
                addresses.pop(0)
                first.kill()

            begun = Barrier(len(bodies), action=lose_the_first)

            def read(path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
                heard = []
                for event in stream(client, path, body):
                    heard.append(event)
                    if len(heard) == CUT_AFTER:
                        begun.wait(PATIENCE_S)
                return heard

            with ThreadPoolExecutor(len(bodies)) as threads:
                heard = list(threads.map(read, *zip(*bodies, strict=True)))
        assert transport.resumed
        for events, whole in zip(heard, expected, strict=True):
            assert len({(event["id"], event["created"]) for event in events}) == 1
            assert texts(events) == whole
        until("the dead replica's requests were not aborted", lambda: not cluster.life.core.sequences)
    finally:
        first.kill()
        second.kill()

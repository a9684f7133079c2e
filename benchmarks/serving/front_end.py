"""What a token costs a front end: from the scheduler's message to the bytes of a client's event, without engine or sockets.

Every stream gets one token a step, and the next step comes once each client has its event, so nothing is merged: the dearest
case. CPU time of the whole process. Imports the endpoint; the scheduler's messages are made here.

    python -m benchmarks.serving.front_end --streams 256 --rounds 5 --json
"""

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.types import Message

from benchmarks.shared.options import positive
from benchmarks.shared.report import Spread, table
from cluster.engine import OnDeltas, OnFailure
from deploy.config.load import EMBEDDED_MODEL
from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.doors.http.app import create_app
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from scheduler.protocol.messages import Deltas, Finished, FinishReason, Request, TalliedMetric
from scheduler.server.stats import ClusterStatus

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"prompt": "def add(a, b):\n"}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "add"}]}),
}
TOKENS = 64
FIRST_TOKEN = 300
"""Tokens from here on are plain text in the checkpoint that comes with Manta."""


class SteppedEngine:
    """Gives each of its streams one token at `step`. Also the cluster that the service connects to."""

    block_size = 256

    def __init__(self) -> None:
        self.streams: list[int] = []
        self.prompt_tokens: dict[int, int] = {}

    def connect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> "SteppedEngine":  # noqa: ARG002
        self._on_deltas = on_deltas
        return self

    async def status(self, maps: bool = False) -> ClusterStatus:  # noqa: ARG002
        return ClusterStatus(phase="ready")

    def submit(self, requests: Sequence[Request]) -> None:
        self.streams += [request.stream for request in requests]
        self.prompt_tokens |= {request.stream: len(request.tokens) // 4 for request in requests}

    def step(self, number: int, last: bool) -> None:
        streams = np.array(self.streams, dtype="<i8")
        tokens = (FIRST_TOKEN + (streams * 7 + number * 13) % 200).astype("<i4")
        ends = tuple(Finished(stream, FinishReason.LENGTH, 0, TOKENS) for stream in self.streams) if last else ()
        positions = np.array([self.prompt_tokens[stream] for stream in self.streams], dtype="<i4").tobytes()
        self._on_deltas(Deltas(streams.tobytes(), tokens.tobytes(), ends, positions=positions, advanced=number))
        if last:
            self.streams = []

    def abort(self, streams: Sequence[int]) -> None: ...

    def stop(self, stream: int, keep_tokens: int) -> None: ...

    def tally(self, metrics: Sequence[TalliedMetric]) -> None: ...

    def leave(self) -> None: ...

    def close(self) -> None: ...


class Audience:
    """The clients: counts the events of a step."""

    def __init__(self, streams: int) -> None:
        self._streams = streams
        self._events = 0
        self.served = asyncio.Event()

    async def send(self, message: Message) -> None:
        """An ASGI server's `send`, for one and all."""
        if message.get("body") and message["more_body"]:
            self._events += 1
            if self._events == self._streams:
                self._events = 0
                self.served.set()


async def ask(app: Any, path: str, body: bytes, send: Any) -> None:
    """One request as an ASGI server would bring it."""
    told = False

    async def receive() -> Message:
        nonlocal told
        if told:
            await asyncio.Event().wait()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"",
             "headers": headers, "http_version": "1.1", "scheme": "http", "client": None, "server": None}  # fmt: skip
    await app(scope, receive, send)


async def microseconds(engine: SteppedEngine, app: Any, way: str, streams: int) -> float:
    """CPU time of one token, submission and end left out."""
    path, content = WAYS[way]
    body = json.dumps(content | {"max_tokens": TOKENS, "stream": True, "ignore_eos": True}).encode()
    audience = Audience(streams)
    clients = [asyncio.create_task(ask(app, path, body, audience.send)) for _ in range(streams)]
    while len(engine.streams) < streams:
        await asyncio.sleep(0)
    spent_s = 0.0
    for step in range(TOKENS):
        began_s = time.process_time()
        audience.served.clear()
        engine.step(step, last=step == TOKENS - 1)
        await audience.served.wait()
        if 0 < step < TOKENS - 1:
            spent_s += time.process_time() - began_s
    await asyncio.gather(*clients)
    return spent_s / (streams * (TOKENS - 2)) * 1e6


async def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Rounds in turns, after one that is not counted."""
    engine = SteppedEngine()
    service = Service(ServedModel.read("tiny", EMBEDDED_MODEL, None), engine)
    running = asyncio.create_task(service.run())
    while not service.connected:
        await asyncio.sleep(0.01)
    app = create_app(service, ServeConfig(), ApiKeys())
    spent: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(options.rounds + 1):
        for way in WAYS:
            spent_us = await microseconds(engine, app, way, options.streams)
            spent[way] += [spent_us] if turn else []
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return spent


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=positive, default=256, help="streams at once (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=5, help="counted rounds of each (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print a JSON object as well")
    options = parser.parse_args()
    spent = asyncio.run(measure(options))
    spreads = {way: Spread.of(values) for way, values in spent.items()}
    rows = [[way, str(spread), f"{1e6 / spread.median:,.0f}"] for way, spread in spreads.items()]
    print(table(["", "us a token", "tokens/s of one core"], rows), flush=True)
    if options.json:
        print(json.dumps({way: spread.median for way, spread in spreads.items()}))


if __name__ == "__main__":
    main()

"""Clients of an OpenAI endpoint, in a process of their own: JSON plans on stdin, what became of each request on stdout.

Open loop: each request goes out at its own time, however slow the answers are. `limit` instead keeps so many under way.
Raw asyncio protocols, since the clients share the machine with what they measure: an event costs them microseconds, a tenth of
what an HTTP library needs. Imports the standard library only.
"""

import asyncio
import json
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any, cast

GIVE_UP_S = 600.0
DONE = b"data: [DONE]"
TOKENS = re.compile(rb'"completion_tokens":(\d+)')


@dataclass(slots=True)
class Outcome:
    """One request. Seconds since the plan began; first_s and gap_s (the longest wait between two events) are None without
    events.

    status: of HTTP; 0 if the connection broke. complete: the stream ended as it should. tokens: by the final usage.
    """

    due_s: float
    sent_s: float = 0.0
    first_s: float | None = None
    last_s: float = 0.0
    gap_s: float | None = None
    events: int = 0
    tokens: int = 0
    status: int = 0
    complete: bool = False
    left: bool = False
    error: str = ""


@dataclass(slots=True)
class Stream(asyncio.Protocol):
    """One streamed request on a connection of its own. leave_after: events after which the client hangs up."""

    outcome: Outcome
    request: bytes
    began_s: float
    leave_after: int | None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _tail: bytes = b""
    _transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self.request)
        self.outcome.sent_s = time.perf_counter() - self.began_s
        if self.leave_after == 0:
            asyncio.get_running_loop().call_soon(self._leave)

    def data_received(self, data: bytes) -> None:
        now_s, outcome = time.perf_counter() - self.began_s, self.outcome
        seen = self._tail + data
        if not outcome.status:
            outcome.status = int(seen[9:12])
        self._tail = seen[-len(DONE) - 512 :]
        events = data.count(b"data: {")
        if events and outcome.status == 200:
            if outcome.first_s is None:
                outcome.first_s = now_s
            else:
                outcome.gap_s = max(outcome.gap_s or 0.0, now_s - outcome.last_s)
            outcome.last_s = now_s
            outcome.events += events
        if DONE in self._tail:
            outcome.complete = b'"error":' not in self._tail
            outcome.tokens = int(found[-1]) if (found := TOKENS.findall(self._tail)) else 0
            self._transport.close()  # type: ignore[union-attr]
        elif self.leave_after is not None and outcome.events >= self.leave_after:
            self._leave()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.outcome.complete and not self.outcome.left:
            self.outcome.error = repr(error) if error else self._tail[-256:].decode(errors="replace")
        self.ended.set()

    def _leave(self) -> None:
        self.outcome.left = True
        self._transport.abort()  # type: ignore[union-attr]


async def run(plan: dict[str, Any]) -> list[Outcome]:
    """plan: host, port, path, limit (or None), requests: each at_s, body, leave_after (or None)."""
    loop, began_s = asyncio.get_running_loop(), time.perf_counter()
    gate = asyncio.Semaphore(plan["limit"] or len(plan["requests"]))

    async def one(asked: dict[str, Any]) -> Outcome:
        await asyncio.sleep(asked["at_s"] - (time.perf_counter() - began_s))
        outcome = Outcome(asked["at_s"])
        async with gate:
            stream = Stream(outcome, _request(plan, asked["body"]), began_s, asked["leave_after"])
            try:
                await loop.create_connection(lambda: stream, plan["host"], plan["port"])
                await asyncio.wait_for(stream.ended.wait(), GIVE_UP_S)
            except OSError as error:  # TimeoutError among them
                outcome.error = repr(error)
        return outcome

    return await asyncio.gather(*map(one, plan["requests"]))


def _request(plan: dict[str, Any], body: dict[str, Any]) -> bytes:
    payload = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    head = (
        f"POST {plan['path']} HTTP/1.1\r\nHost: {plan['host']}\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


def main() -> None:
    """One plan a line until stdin ends."""
    for line in sys.stdin:
        outcomes = asyncio.run(run(json.loads(line)))
        print(json.dumps([asdict(outcome) for outcome in outcomes]), flush=True)


if __name__ == "__main__":
    main()

"""The clients: so many streams under way all the time, each client asking again where it was refused or has lost its stream.

A client is a good one: it waits as long as a Retry-After says, and where its stream's events have ids it takes up a stream that
was cut by the last of them. Imports httpx, asks, the ledger and `shared.endpoint`.
"""

import asyncio
import contextlib
import json
import random
import threading
import time
import uuid
from collections.abc import Sequence

import httpx

from benchmarks.chaos.asks import Answer, Ask
from benchmarks.chaos.ledger import Ledger, Loss
from benchmarks.shared.endpoint import ServingError

SILENT_S = 180.0
"""Without a byte, after which a client gives a stream up for lost."""

AGAIN_S = 0.5
"""Before a client asks again where nobody has said when."""

CANCEL_AGAIN_S = 1.0
JOIN_TIMEOUT_S = 60.0


class Taken:
    """One request as far as it is answered, over all the connections that it has taken."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.restart()

    def restart(self) -> None:
        """Nothing of what was there can be used."""
        self.answer = Answer()
        self.request_id = uuid.uuid4().hex
        self.last_event: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Of a client that goes on where it was: it asks for ids of events, and comes back with the last."""
        asked = {"X-Request-Id": self.request_id, "Accept": "text/event-stream"}
        return asked | ({"Last-Event-ID": self.last_event} if self.last_event else {})


class Clients:
    """On an event loop in a thread of their own; `with` ends them, their requests too."""

    def __init__(self, address: str, asks: Sequence[Ask], ledger: Ledger, count: int, seed: int) -> None:
        self._address = address
        self._asks = asks
        self._ledger = ledger
        self._count = count
        self._seed = seed
        self._loop: asyncio.AbstractEventLoop | None = None
        self._begun = threading.Event()
        self._ending = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="chaos-clients", daemon=True)

    def __enter__(self) -> "Clients":
        self._thread.start()
        self._begun.wait()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join(JOIN_TIMEOUT_S)

    def _run(self) -> None:
        asyncio.run(self._keep_asking())

    async def _keep_asking(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._begun.set()
        async with http_to(self._address) as http:
            clients = [asyncio.create_task(self._client(http, number)) for number in range(self._count)]
            await self._ending.wait()
            under_way = set(clients)
            while under_way:  # again: what a connection raises as it closes may take a cancellation's place
                for client in under_way:
                    client.cancel()
                _, under_way = await asyncio.wait(under_way, timeout=CANCEL_AGAIN_S)
            for client in clients:
                if not client.cancelled() and (error := client.exception()) is not None:
                    raise error

    async def _client(self, http: httpx.AsyncClient, client: int) -> None:
        draw = random.Random(self._seed << 16 | client)
        while True:
            await fulfil(http, Taken(draw.choice(self._asks)), self._ledger, client)


def undisturbed(address: str, asks: Sequence[Ask], at_once: int) -> dict[int, Answer]:
    """Each ask's answer, by its number. Errors: ServingError if one was lost or refused."""
    ledger = Ledger()

    async def all_of_them() -> None:
        gate = asyncio.Semaphore(at_once)

        async def one(http: httpx.AsyncClient, ask: Ask) -> None:
            async with gate:
                await fulfil(http, Taken(ask), ledger, ask.number)

        async with http_to(address) as http:
            await asyncio.gather(*(one(http, ask) for ask in asks))

    asyncio.run(all_of_them())
    incident = ledger.incidents[0]
    if incident.lost or incident.refused:
        raise ServingError(f"undisturbed, and yet lost {dict(incident.lost)}, refused {dict(incident.refused)}")
    return ledger.gathered


def http_to(address: str) -> httpx.AsyncClient:
    """Every request on a connection of its own."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=address, timeout=SILENT_S, limits=limits, trust_env=False)


async def fulfil(http: httpx.AsyncClient, taken: Taken, ledger: Ledger, client: int) -> None:
    """Asks until there is a whole answer, which the ledger gets. client: its number."""
    while True:
        ledger.begins(client)
        try:
            loss = await _attempt(http, taken, ledger, client)
        finally:
            ledger.ends(client)
        if loss is None:
            ledger.answered(taken.ask, taken.answer)
            return
        if loss.lost and loss.cut and taken.last_event:
            ledger.taken_up(client)
        else:
            ledger.loses(client, loss)
            if loss.lost:
                taken.restart()
        await asyncio.sleep(loss.again_s if loss.again_s is not None else AGAIN_S)


async def _attempt(http: httpx.AsyncClient, taken: Taken, ledger: Ledger, client: int) -> Loss | None:
    """Over one connection; what went wrong, or None once the answer is whole."""
    begun = False
    try:
        async with http.stream("POST", taken.ask.path, json=taken.ask.body, headers=taken.headers) as response:
            if response.status_code != 200:
                told = response.headers.get("retry-after")
                with contextlib.suppress(httpx.HTTPError):
                    await response.aread()
                return Loss(str(response.status_code), lost=False, again_s=float(told) if told else None)
            begun = True
            return await _read(response, taken, ledger, client)
    except (httpx.ConnectError, httpx.ConnectTimeout):
        return Loss("nobody listens", lost=False)
    except httpx.TimeoutException:
        return Loss(f"silent for {SILENT_S:g} s", lost=True)
    except httpx.HTTPError:
        return Loss("cut" if begun else "cut before an answer", lost=True, cut=True)


async def _read(response: httpx.Response, taken: Taken, ledger: Ledger, client: int) -> Loss | None:
    event_id: str | None = None
    async for line in response.aiter_lines():
        field, _, value = line.partition(": ")
        if field == "id":
            event_id = value
        elif field == "data" and value == "[DONE]":
            return None if taken.answer.whole else Loss("ended early", lost=True)
        elif field == "data":
            event = json.loads(value)
            if "error" in event:
                return Loss("error event", lost=True, said=str(event["error"].get("message", event["error"])))
            if taken.answer.take(event):
                ledger.token(client, time.monotonic())
            taken.last_event = event_id or taken.last_event
    return Loss("cut", lost=True, cut=True)

"""How much a request goes to and fro on its way in: from an ASGI server's call to the engine's `submit`.

Hops are counted in `deploy/` (`benchmarks.shared.hops`). The first request is not: it makes what is made once. Imports the
endpoint; its engine takes requests and does nothing.

    python -m benchmarks.serving.hops --trace
"""

import argparse
import asyncio
import contextlib
import json
from typing import Any

from starlette.types import Message

import deploy
from benchmarks.serving.front_end import WAYS, SteppedEngine, ask
from benchmarks.shared.hops import Calls, report
from deploy.config.load import EMBEDDED_MODEL
from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.doors.http.app import create_app
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service

QUIET_S = 0.05


class IdleEngine(SteppedEngine):
    """Takes requests; the way in ends there."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls
        self.taken = asyncio.Event()

    def submit(self, requests: Any) -> None:
        self._calls.counting = False
        self.taken.set()
        super().submit(requests)


async def _unheard(_: Message) -> None: ...


async def way_in(way: str) -> Calls:
    """The calls of the second request of its kind."""
    calls = Calls(deploy)
    engine = IdleEngine(calls)
    service = Service(ServedModel.read("tiny", EMBEDDED_MODEL, None), engine)
    running = asyncio.create_task(service.run())
    while not service.connected:
        await asyncio.sleep(QUIET_S)
    app = create_app(service, ServeConfig(), ApiKeys())
    path, content = WAYS[way]
    body = json.dumps(content | {"max_tokens": 16}).encode()
    with calls.watching():
        for counting in (False, True):
            engine.taken.clear()
            calls.counting = counting
            client = asyncio.create_task(ask(app, path, body, _unheard))
            await engine.taken.wait()
            client.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await client
            await asyncio.sleep(QUIET_S)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return calls


def main() -> None:
    """Parse the command line, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", action="store_true", help="print each hop")
    options = parser.parse_args()
    report({way: asyncio.run(way_in(way)) for way in WAYS}, trace=options.trace)


if __name__ == "__main__":
    main()

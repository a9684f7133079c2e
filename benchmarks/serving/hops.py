"""How much a request goes to and fro on its way in: from an ASGI server's call to the engine's `submit`.

A hop is a call into a file of `deploy/` from another one, or from outside, in any thread; calls in a row into one file are one
hop, and a coroutine or a generator is called once, when it begins. Again: hops into files that had been entered before. The
first request is not counted: it makes what is made once. Imports the endpoint; its engine takes requests and does nothing.

    python -m benchmarks.serving.hops --trace
"""

import argparse
import asyncio
import contextlib
import inspect
import json
import sys
import threading
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import FrameType
from typing import Any

from starlette.types import Message

import deploy
from benchmarks.serving.front_end import WAYS, SteppedEngine, ask
from benchmarks.shared.report import table
from deploy.config.load import EMBEDDED_MODEL
from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.doors.http.app import create_app
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service

ROOM = f"{Path(deploy.__file__).parent}/"
GOES_ON = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
QUIET_S = 0.05


class Calls:
    """Those into another file while `counting`: (file, what of it), one after the other."""

    def __init__(self) -> None:
        self.counting = False
        self.made: list[tuple[str, str]] = []
        self._begun: set[FrameType] = set()

    def see(self, frame: FrameType, event: str, _: Any) -> None:
        """For `sys.setprofile`."""
        code = frame.f_code
        if not self.counting or event != "call" or not code.co_filename.startswith(ROOM) or frame in self._begun:
            return
        if code.co_flags & GOES_ON:
            self._begun.add(frame)
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(ROOM):
            caller = caller.f_back
        if caller is not None and caller.f_code.co_filename == code.co_filename:
            return
        self.made.append((code.co_filename.removeprefix(ROOM), code.co_qualname))

    def hops(self) -> list[tuple[str, list[str]]]:
        """(file, what of it is called before another is entered)."""
        return [(file, [name for _, name in calls]) for file, calls in groupby(self.made, itemgetter(0))]


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
    calls = Calls()
    engine = IdleEngine(calls)
    service = Service(ServedModel.read("tiny", EMBEDDED_MODEL, None), engine)
    running = asyncio.create_task(service.run())
    while not service.connected:
        await asyncio.sleep(QUIET_S)
    app = create_app(service, ServeConfig(), ApiKeys())
    path, content = WAYS[way]
    body = json.dumps(content | {"max_tokens": 16}).encode()
    sys.setprofile(calls.see)
    threading.setprofile(calls.see)
    for counting in (False, True):
        engine.taken.clear()
        calls.counting = counting
        client = asyncio.create_task(ask(app, path, body, _unheard))
        await engine.taken.wait()
        client.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await client
        await asyncio.sleep(QUIET_S)
    sys.setprofile(None)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return calls


def main() -> None:
    """Parse the command line, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", action="store_true", help="print each hop")
    options = parser.parse_args()
    rows = []
    for way in WAYS:
        hops = asyncio.run(way_in(way)).hops()
        files = {file for file, _ in hops}
        rows.append([way, str(len(hops)), str(len(files)), str(len(hops) - len(files))])
        if options.trace:
            print(f"{way}:", *(f"  {file:40} {', '.join(names)}" for file, names in hops), sep="\n", end="\n\n")
    print(table(["way", "hops", "files", "again"], rows))


if __name__ == "__main__":
    main()

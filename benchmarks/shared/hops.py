"""How much a thing goes to and fro in a room: calls into a file of it from another one, or from outside, in any thread.

Calls in a row into one file are one hop. A coroutine or a generator is called once, when it begins.
"""

import contextlib
import inspect
import sys
import threading
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from benchmarks.shared.report import table

GOES_ON = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Calls:
    """Those into another file while `counting`: (file, what of it), one after the other."""

    def __init__(self, room: ModuleType) -> None:
        self.counting = False
        self.made: list[tuple[str, str]] = []
        self._room = f"{Path(str(room.__file__)).parent}/"
        self._begun: set[FrameType] = set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """This thread, and those that begin meanwhile."""
        sys.setprofile(self._see)
        threading.setprofile(self._see)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """What is called meanwhile counts."""
        with self.watching():
            self.counting = True
            yield
            self.counting = False

    def hops(self) -> list[tuple[str, list[str]]]:
        """(file, what of it is called before another is entered)."""
        return [(file, [name for _, name in calls]) for file, calls in groupby(self.made, itemgetter(0))]

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if not self.counting or event != "call" or not code.co_filename.startswith(self._room) or frame in self._begun:
            return
        if code.co_flags & GOES_ON:
            self._begun.add(frame)
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(self._room):
            caller = caller.f_back
        if caller is None or caller.f_code.co_filename != code.co_filename:
            self.made.append((code.co_filename.removeprefix(self._room), code.co_qualname))


def report(ways: dict[str, Calls], *, trace: bool) -> None:
    """Prints a table; trace: each hop before it. Again: hops into files that had been entered before."""
    rows = []
    for way, calls in ways.items():
        hops = calls.hops()
        files = {file for file, _ in hops}
        rows.append([way, *map(str, (len(calls.made), len(hops), len(files), len(hops) - len(files)))])
        if trace:
            print(f"{way}:", *(f"  {file:40} {', '.join(names)}" for file, names in hops), sep="\n", end="\n\n")
    print(table(["way", "calls", "hops", "files", "again"], rows))

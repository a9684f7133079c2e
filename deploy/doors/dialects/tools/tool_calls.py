"""Finds the tool calls in an output that arrives in pieces, whichever borders cut it.

    pieces ──push──▶ Feed ──read by generators that wait where they need more──▶ PlainText, CallBegin, CallArguments

Pure functions over text: no tokens, no clock, no randomness; imports nothing of the engine.
"""

from collections.abc import Callable, Mapping
from typing import Any

from deploy.doors.dialects.tools.events import Event, Events
from deploy.doors.dialects.tools.families.format import SPACE, ToolFormat
from deploy.doors.dialects.tools.pieces import Feed, Reading


class ToolCallParser:
    """Tells text from calls as an output grows.

    A call counts once it has named a known function and opened its arguments; what is malformed before that is text, and stays
    so. From then on its arguments are told as they come, up to their end. What wraps a call is not shown, nor white space
    between calls; everything else is in exactly one event, and the events, put together, do not depend on how the output was
    cut. Reads each character once.
    """

    def __init__(
        self, form: ToolFormat, schemas: Mapping[str, Mapping[str, Any]], new_id: Callable[[], str], *, parallel: bool = True
    ) -> None:
        """schemas: of the arguments of each function that may be called. new_id: makes a call's id. parallel: False leaves out
        every call after the first."""
        self._form = form
        self._feed = Feed()
        self._events = Events(schemas, new_id, form.gap, parallel=parallel)
        self._reading = self._anywhere() if form.begins else self._at_the_start()
        next(self._reading)

    @property
    def called(self) -> bool:
        """There has been a call: an output that stops now stops for "tool_calls"."""
        return self._events.calls > 0

    def push(self, text: str) -> list[Event]:
        """Takes the next text; returns what is certain now."""
        self._feed.add(text)
        next(self._reading, None)
        return self._events.take()

    def flush(self) -> list[Event]:
        """The output has ended: returns whatever was held back. Called once, last."""
        self._feed.ended = True
        next(self._reading, None)
        self._events.end()
        return self._events.take()

    def _anywhere(self) -> Reading[None]:
        """Text, and calls that announce themselves."""
        feed, events = self._feed, self._events
        while mark := (yield from feed.before(self._form.begins, events.show)):
            begin, feed.kept = feed.at - len(mark), True
            if not (yield from self._form.read(mark, feed, events)):
                events.show(feed.text[begin : feed.at])
            feed.kept = False

    def _at_the_start(self) -> Reading[None]:
        """Calls and nothing else, until something is no call; the rest is text."""
        feed, events = self._feed, self._events
        feed.kept = True
        yield from feed.skip(SPACE)
        for prefix in self._form.prefixes:
            yield from feed.take(prefix)
        if not (yield from self._form.read("", feed, events)):
            feed.at = 0
        feed.kept = False
        while True:
            events.show(feed.take_to(len(feed.text)))
            if feed.ended:
                return
            yield

"""Finds the tool calls in an output that arrives in pieces, whichever borders cut it.

    pieces ──push──▶ Feed ──read by generators that wait where they need more──▶ Text, CallBegin, CallArguments

Pure functions over text: no tokens, no clock, no randomness; imports nothing of the engine.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from deploy.doors.openai.tools.pieces import Feed, Reading
from deploy.text.stops import overlap
from deploy.text.tokenizer import TOOL_MARKS

ARGUMENT_KEYS = ("arguments", "parameters")
OTHER_KEYS = ("id", "type")
"""What a call's object may hold beside its name and its arguments. Any other key says that this JSON is an answer."""

_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes its calls: `begin`, an object {"name": ..., `arguments`: {...}}, `end`.

    begin: may stand anywhere in the text; empty where calls are the whole output. end: may be missing where the output or
    the next call says as much. join: what stands between two calls. prefix: what may stand before the first one.
    """

    name: str
    begin: str
    end: str
    join: str
    arguments: str
    prefix: str = ""


HERMES = ToolFormat("hermes", begin=TOOL_MARKS[0], end=TOOL_MARKS[1], join="\n", arguments="arguments")
LLAMA = ToolFormat("llama", begin="", end=";", join="; ", arguments="parameters", prefix="<|python_tag|>")


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text of the answer that belongs to no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call is certain. index: 0 for the output's first call."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """What is new of a call's arguments, as the model wrote them; put together, one JSON object if the model kept to JSON."""

    index: int
    text: str


Event = PlainText | CallBegin | CallArguments


class ToolCallParser:
    """Tells text from calls as an output grows.

    A call counts once its object has named a known function and opened its arguments; what is malformed before that is
    text, and stays so. From then on its arguments are passed on as they come, up to the brace that closes them. What wraps a
    call, white space beside it included, is not shown; everything else is in exactly one event, and the events, put together,
    do not depend on how the output was cut. Reads each character once.
    """

    def __init__(self, form: ToolFormat, names: Collection[str], new_id: Callable[[], str], *, parallel: bool = True) -> None:
        """names: of the functions that may be called. new_id: makes a call's id. parallel: False leaves out every call after
        the first."""
        self._form = form
        self._names = names
        self._new_id = new_id
        self._parallel = parallel
        self._feed = Feed()
        self._events: list[Event] = []
        self._space = ""  # at the end of the text so far; shown only if more text follows
        self._calls = 0
        self._reading = self._anywhere() if form.begin else self._at_the_start()
        next(self._reading)

    @property
    def called(self) -> bool:
        """There has been a call: an output that stops now stops for "tool_calls"."""
        return self._calls > 0

    def push(self, text: str) -> list[Event]:
        """Takes the next text; returns what is certain now."""
        self._feed.add(text)
        return self._advance()

    def flush(self) -> list[Event]:
        """The output has ended: returns whatever was held back. Called once, last."""
        self._feed.ended = True
        events = self._advance()
        return [*events, PlainText(self._space)] if self._space else events

    def _advance(self) -> list[Event]:
        next(self._reading, None)
        events, self._events = self._events, []
        return events

    # ---- the output ----

    def _anywhere(self) -> Reading[None]:
        """Text, and calls that announce themselves."""
        feed, begin = self._feed, self._form.begin
        while True:
            found = feed.text.find(begin, feed.at)
            if found >= 0:
                self._show(feed.take_to(found))
                feed.kept = True
                feed.at += len(begin)
                if not (yield from self._call()):
                    self._show(feed.text[found : feed.at])
                feed.kept = False
                continue
            self._show(feed.take_to(len(feed.text) - (0 if feed.ended else overlap(feed.text[feed.at :], begin))))
            if feed.ended:
                return
            yield

    def _at_the_start(self) -> Reading[None]:
        """Calls and nothing else, until something is no call; the rest is text."""
        feed = self._feed
        begin, feed.kept = 0, True
        yield from feed.take(self._form.prefix)
        while (yield from self._call()):
            begin, feed.kept = feed.at, True
        feed.at, feed.kept = begin, False
        while True:
            self._show(feed.take_to(len(feed.text)))
            if feed.ended:
                return
            yield

    # ---- a call ----

    def _call(self) -> Reading[bool]:
        """Reads one call with its end. False: it is none, and nothing of it has been told."""
        feed = self._feed
        yield from feed.skip(_SPACE)
        if not (yield from feed.take("{")) or not (yield from self._head()):
            return False
        feed.kept = False
        while True:  # what follows the arguments is read with patience: a brace too few or too many costs no call
            yield from feed.skip(_SPACE)
            if not (yield from feed.take("}")) and not (yield from self._another_member()):
                break
        yield from feed.take(self._form.end)
        yield from feed.skip(_SPACE)
        return True

    def _head(self) -> Reading[bool]:
        """A call's object from its first member up to and including its arguments, and tells them. False: it is no call."""
        feed, name, arguments = self._feed, None, ""
        while True:
            key = yield from self._key()
            if key == "name":
                name = yield from feed.string()
                if name not in self._names:
                    return False
            elif key in ARGUMENT_KEYS and (yield from feed.peek()) == "{":
                if name is not None:
                    yield from self._tell_as_they_come(name)
                    return True
                arguments = yield from feed.value()
            elif key not in OTHER_KEYS or not (yield from feed.value()):
                return False
            yield from feed.skip(_SPACE)
            if name is not None and (arguments or (yield from feed.peek()) == "}"):
                self._begin(name)
                self._tell(arguments or "{}")
                return True
            if not (yield from feed.take(",")):
                return False

    def _key(self) -> Reading[str | None]:
        """A key and its colon; None if something else comes."""
        feed = self._feed
        yield from feed.skip(_SPACE)
        key = yield from feed.string()
        yield from feed.skip(_SPACE)
        if not (yield from feed.take(":")):
            return None
        yield from feed.skip(_SPACE)
        return key

    def _another_member(self) -> Reading[bool]:
        """A comma, a key and a value after the arguments. False, and nothing is read, if something else comes."""
        feed = self._feed
        begin, feed.kept = feed.at, True
        found = (
            (yield from feed.take(","))
            and (yield from self._key()) is not None
            and (yield from feed.value()) != ""
        )  # fmt: skip
        feed.at, feed.kept = feed.at if found else begin, False
        return found

    # ---- what is told ----

    def _show(self, text: str) -> None:
        """Text of the answer. White space at its end waits for what follows."""
        bare = text.rstrip()
        if bare:
            self._events.append(PlainText(self._space + bare))
            self._space = ""
        self._space += text[len(bare) :]

    def _begin(self, name: str) -> None:
        self._space = ""
        if self._parallel or not self._calls:
            self._events.append(CallBegin(self._calls, self._new_id(), name))
        self._calls += 1

    def _tell(self, arguments: str) -> None:
        index = self._calls - 1
        if arguments and (self._parallel or not index):
            self._events.append(CallArguments(index, arguments))

    def _tell_as_they_come(self, name: str) -> Reading[None]:
        feed = self._feed
        self._begin(name)
        feed.kept, waiting = False, True
        reading = feed.nested()
        while waiting:
            begin = feed.at
            waiting = next(reading, False) is None
            self._tell(feed.text[begin : feed.at])
            if waiting:
                yield

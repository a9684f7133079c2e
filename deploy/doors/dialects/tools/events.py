"""What an output says, told as soon as it is certain: text of the answer, and calls of tools. Imports nothing of Manta."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


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
    """What is new of a call's arguments; put together, one JSON object if the model kept to its own syntax."""

    index: int
    text: str


Event = PlainText | CallBegin | CallArguments


class Events:
    """Those of one output, in order.

    schemas: of the arguments of each function that may be called, by its name. parallel: False leaves out every call after the
    first. gap: white space that a template writes between an answer and a call, which is no part of the answer.
    """

    def __init__(
        self, schemas: Mapping[str, Mapping[str, Any]], new_id: Callable[[], str], gap: str = "", *, parallel: bool = True
    ) -> None:
        self.schemas = schemas
        self.calls = 0
        self._new_id = new_id
        self._gap = gap
        self._parallel = parallel
        self._events: list[Event] = []
        self._space = ""  # at the end of the text so far
        self._spoken = False  # since the last call, or the beginning

    def show(self, text: str) -> None:
        """Text of the answer. White space at its end waits for what follows."""
        bare = text.rstrip()
        if bare:
            self._events.append(PlainText(self._space + bare))
            self._space, self._spoken = "", True
        self._space += text[len(bare) :]

    def begin(self, name: str, id: str | None = None) -> None:
        """A call. White space before it alone is no text. id: the model's own, where it makes one."""
        space = self._space.removesuffix(self._gap)
        if space and self._spoken:
            self._events.append(PlainText(space))
        self._space, self._spoken = "", False
        if self._parallel or not self.calls:
            self._events.append(CallBegin(self.calls, id or self._new_id(), name))
        self.calls += 1

    def tell(self, arguments: str) -> None:
        """What is new of the last call's arguments, as JSON."""
        index = self.calls - 1
        if arguments and (self._parallel or not index):
            self._events.append(CallArguments(index, arguments))

    def end(self) -> None:
        """The output has ended."""
        if self._space and (self._spoken or not self.calls):
            self._events.append(PlainText(self._space))
            self._space = ""

    def take(self) -> list[Event]:
        """Those since the last time."""
        events, self._events = self._events, []
        return events

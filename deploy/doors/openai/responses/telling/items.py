"""One item of a response as it grows: a thought, a message or a call. Each tells the events of its life, from added to done.

Imports the events and the records; no HTTP.
"""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from deploy.doors.openai.answers.records import TokenLogprob
from deploy.doors.openai.responses.telling import events
from deploy.doors.openai.responses.telling.events import Event
from deploy.doors.openai.responses.telling.records import (
    FunctionCallItem,
    OutputItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Status,
    SummaryText,
)

Numbers = Callable[[], int]
"""Gives the next event's number."""

I = TypeVar("I", bound=OutputItem)  # noqa: E741


class GrowingItem(ABC, Generic[I]):
    """output_index: its place in the output."""

    prefix: ClassVar[str]

    def __init__(self, output_index: int, number: Numbers) -> None:
        self.id = f"{self.prefix}_{uuid.uuid4().hex}"
        self._index = output_index
        self._number = number
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """So far."""
        return "".join(self._pieces)

    def begin(self) -> Iterator[Event]:
        yield events.ItemAdded(sequence_number=self._number(), output_index=self._index, item=self.blank())
        yield from self._parts_begin()

    def end(self, status: Status) -> Iterator[Event]:
        yield from self._parts_end()
        yield events.ItemDone(sequence_number=self._number(), output_index=self._index, item=self.item(status))

    def _head(self) -> dict[str, Any]:
        """What each event of its parts says."""
        return {"sequence_number": self._number(), "item_id": self.id, "output_index": self._index}

    @abstractmethod
    def blank(self) -> I:
        """As it begins."""

    @abstractmethod
    def item(self, status: Status) -> I:
        """As it is now."""

    def _parts_begin(self) -> Iterator[Event]:
        yield from ()

    @abstractmethod
    def _parts_end(self) -> Iterator[Event]:
        """What its parts have come to."""


class GrowingThought(GrowingItem[ReasoningItem]):
    """summarised: its text is told as its summary, too, which is where many clients look: no model sums up here."""

    prefix = "rs"

    def __init__(self, output_index: int, number: Numbers, *, summarised: bool) -> None:
        super().__init__(output_index, number)
        self._summarised = summarised

    def add(self, text: str) -> Iterator[Event]:
        self._pieces.append(text)
        yield events.ReasoningDelta(**self._head(), delta=text)
        if self._summarised:
            yield events.SummaryDelta(**self._head(), delta=text)

    def blank(self) -> ReasoningItem:
        return ReasoningItem(id=self.id, status="in_progress", summary=[], content=[])

    def item(self, status: Status) -> ReasoningItem:
        text = self.text
        summary = [SummaryText(text=text)] if self._summarised else []
        return ReasoningItem(id=self.id, status=status, summary=summary, content=[ReasoningText(text=text)])

    def _parts_begin(self) -> Iterator[Event]:
        yield events.PartAdded(**self._head(), part=ReasoningText(text=""))
        if self._summarised:
            yield events.SummaryPartAdded(**self._head(), part=SummaryText(text=""))

    def _parts_end(self) -> Iterator[Event]:
        text = self.text
        yield events.ReasoningDone(**self._head(), text=text)
        yield events.PartDone(**self._head(), part=ReasoningText(text=text))
        if self._summarised:
            yield events.SummaryDone(**self._head(), text=text)
            yield events.SummaryPartDone(**self._head(), part=SummaryText(text=text))


class GrowingMessage(GrowingItem[OutputMessage]):
    """With its log-probabilities, if any were asked for."""

    prefix = "msg"

    def __init__(self, output_index: int, number: Numbers) -> None:
        super().__init__(output_index, number)
        self._logprobs: list[TokenLogprob] = []

    def add(self, text: str, logprobs: Sequence[TokenLogprob]) -> Iterator[Event]:
        self._pieces.append(text)
        self._logprobs += logprobs
        yield events.OutputTextDelta(**self._head(), delta=text, logprobs=[*logprobs])

    def blank(self) -> OutputMessage:
        return OutputMessage(id=self.id, status="in_progress", content=[])

    def item(self, status: Status) -> OutputMessage:
        return OutputMessage(id=self.id, status=status, content=[self._part()])

    def _parts_begin(self) -> Iterator[Event]:
        yield events.PartAdded(**self._head(), part=OutputText(text=""))

    def _parts_end(self) -> Iterator[Event]:
        part = self._part()
        yield events.OutputTextDone(**self._head(), text=part.text, logprobs=part.logprobs)
        yield events.PartDone(**self._head(), part=part)

    def _part(self) -> OutputText:
        return OutputText(text=self.text, logprobs=[*self._logprobs])


class GrowingCall(GrowingItem[FunctionCallItem]):
    """call_id: by which the client names what it answers."""

    prefix = "fc"

    def __init__(self, output_index: int, number: Numbers, call_id: str, name: str) -> None:
        super().__init__(output_index, number)
        self._call_id = call_id
        self._name = name

    def add(self, arguments: str) -> Iterator[Event]:
        self._pieces.append(arguments)
        yield events.ArgumentsDelta(**self._head(), delta=arguments)

    def blank(self) -> FunctionCallItem:
        return FunctionCallItem(id=self.id, call_id=self._call_id, status="in_progress", name=self._name, arguments="")

    def item(self, status: Status) -> FunctionCallItem:
        return FunctionCallItem(id=self.id, call_id=self._call_id, status=status, name=self._name, arguments=self.text)

    def _parts_end(self) -> Iterator[Event]:
        yield events.ArgumentsDone(**self._head(), name=self._name, arguments=self.text)

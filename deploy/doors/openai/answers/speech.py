"""One choice's text, told as thoughts, content and calls of tools. Imports the readers of both, and the records; no HTTP."""

import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from msgspec import UNSET

from deploy.doors.dialects.reasoning.reasoning import Thinking
from deploy.doors.dialects.reasoning.sections import Section
from deploy.doors.dialects.tools.events import CallArguments, CallBegin, Event, PlainText
from deploy.doors.dialects.tools.tools import Tools
from deploy.doors.openai.answers.logprobs import Entry
from deploy.doors.openai.answers.records import CalledFunction, CalledTool


@dataclass(frozen=True, slots=True)
class Said:
    """A thought, or a part of the answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[CalledTool] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


@dataclass(frozen=True, slots=True)
class Thought:
    """Text of a thought."""

    text: str


class Speech:
    """Calls are looked for in the answer alone. What is said is thoughts and answers by turns, each as long as it goes on,
    whatever borders cut it. had: so many of these turns are not told again, since the client has had them whole. id_prefix: of
    the ids of calls."""

    def __init__(self, tools: Tools | None, thinking: Thinking | None, had: int = 0, id_prefix: str = "call_") -> None:
        self._calls = None if tools is None else tools.parser(lambda: f"{id_prefix}{uuid.uuid4().hex}")
        self._sections = None if thinking is None else thinking.parser()
        self._sorter = None if thinking is None else thinking.sorter()
        self._had = had
        self._thought: bool | None = None  # what was said last
        self.turns = 0
        """So many have begun."""

    def told(self, text: str, ended: bool, in_parts: bool = False, known: bool = False) -> list[Said]:
        """What is new, a part for each turn. in_parts: calls are numbered, since more of them may follow. known: the client has
        it."""
        said: list[Said] = []
        for thought, events in groupby(self.events(text, ended), lambda event: isinstance(event, Thought)):
            if not (part := _sorted(events, in_parts)):
                continue
            if thought != self._thought:
                self._thought, self.turns = thought, self.turns + 1
            if known or self.turns > self._had:
                said.append(part)
        return said

    def answers(self, entries: Sequence[Entry], ended: bool) -> list[Entry]:
        """Of new tokens, those of the answer."""
        if self._sorter is None:
            return [*entries]
        answers = self._sorter.push((next(iter(entry)), entry) for entry in entries)
        return answers + self._sorter.flush() if ended else answers

    def finish_reason(self, reason: str | None) -> str | None:
        """An output that has stopped with a call has stopped for it."""
        called = self._calls is not None and self._calls.called
        return "tool_calls" if reason == "stop" and called else reason

    def events(self, text: str, ended: bool) -> Iterator[Thought | Event]:
        """What is new, in order: for doors that do not tell it in a message's parts. Not beside `told`."""
        for section in self._read(text, ended):
            if section.thought:
                yield Thought(section.text)
            elif self._calls is None:
                yield PlainText(section.text)
            else:
                yield from self._calls.push(section.text)
        if ended and self._calls is not None:
            yield from self._calls.flush()

    def _read(self, text: str, ended: bool) -> list[Section]:
        if self._sections is None:
            return [Section(False, text)] if text else []
        sections = self._sections.push(text)
        return sections + self._sections.flush() if ended else sections


def _sorted(events: Iterable[Thought | Event], in_parts: bool) -> Said:
    reasoning = content = ""
    begins: dict[int, CallBegin] = {}
    arguments: dict[int, str] = {}
    for each in events:
        match each:
            case Thought(text):
                reasoning += text
            case PlainText(text):
                content += text
            case CallBegin(index):
                begins[index], arguments[index] = each, ""
            case CallArguments(index, text):
                arguments[index] = arguments.get(index, "") + text
    calls = [_call(index, begins.get(index), text, in_parts) for index, text in arguments.items()]
    return Said(reasoning, content, calls)


def _call(index: int, begin: CallBegin | None, arguments: str, in_parts: bool) -> CalledTool:
    """begin: None if the call has been told before."""
    number = index if in_parts else UNSET
    if begin is None:
        return CalledTool(index=number, function=CalledFunction(arguments=arguments))
    return CalledTool(index=number, id=begin.id, type="function", function=CalledFunction(name=begin.name, arguments=arguments))

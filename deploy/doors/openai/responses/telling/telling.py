"""A response as its output comes: the same events make the whole answer and the stream, so both say the same.

    OutputDelta ──push──▶ Thought, PlainText, CallBegin, CallArguments ──▶ items, and the events of their lives

Imports the readers of outputs, the items and the records; no HTTP.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import msgspec

from deploy.doors.dialects.tools.events import CallArguments, CallBegin, PlainText
from deploy.doors.dialects.tools.events import Event as Said
from deploy.doors.openai.answers.gathering import UsageMeter
from deploy.doors.openai.answers.logprobs import Entry, TokenNames, chat_logprobs
from deploy.doors.openai.answers.records import CompletionTokens, TokenLogprob, Usage
from deploy.doors.openai.answers.speech import Speech, Thought
from deploy.doors.openai.generation.endpoint import Accepted
from deploy.doors.openai.responses.telling import events
from deploy.doors.openai.responses.telling.events import Event
from deploy.doors.openai.responses.telling.items import GrowingCall, GrowingItem, GrowingMessage, GrowingThought
from deploy.doors.openai.responses.telling.records import (
    IncompleteDetails,
    InputDetails,
    OutputDetails,
    OutputItem,
    ReasoningItem,
    Response,
    ResponseError,
    ResponseUsage,
    Status,
)
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.outputs import ChoiceDelta, OutputDelta

CODES = {Fault.OVERLOADED: "rate_limit_exceeded", Fault.INVALID: "invalid_prompt", Fault.UNPROCESSABLE: "invalid_prompt"}


class ResponseTelling:
    """Of one response. opened: the response before anything has been said. summarised: thoughts have summaries."""

    def __init__(self, opened: Response, accepted: Accepted[Any], names: TokenNames, *, summarised: bool) -> None:
        self._response = opened
        self._summarised = summarised
        self._meter = UsageMeter(accepted.prompts, accepted.thinking)
        self._speech = Speech(accepted.tools, accepted.thinking)
        self._tokens = _Tokens(names, aligned=accepted.tools is not None)
        self._count = itertools.count()
        self._output: list[OutputItem] = []
        self._growing: GrowingItem[Any] | None = None
        self._cut = False

    def begin(self) -> Iterator[Event]:
        yield events.Created(sequence_number=self._number(), response=self._response)
        yield events.InProgress(sequence_number=self._number(), response=self._response)

    def push(self, delta: OutputDelta) -> list[Event]:
        """What is new; with the end of the output, that of the last item."""
        self._meter.take(delta)
        return [event for new in delta.choices for event in self._take(new)]

    def whole(self) -> Response:
        """Once the output has ended."""
        return self._now(
            status="incomplete" if self._cut else "completed",
            completed_at=None if self._cut else int(time.time()),
            incomplete_details=IncompleteDetails() if self._cut else None,
        )

    def end(self, response: Response) -> Event:
        """The last event. response: the whole."""
        kind = events.Incomplete if response.status == "incomplete" else events.Completed
        return kind(sequence_number=self._number(), response=response)

    def fail(self, error: RequestError) -> Iterator[Event]:
        """The last events. What was under way stays incomplete."""
        if self._growing is not None:
            self._output.append(self._growing.item("incomplete"))
        yield events.Error(sequence_number=self._number(), code=error.code, message=error.message, param=error.param)
        failure = ResponseError(code=cast(Any, CODES.get(error.fault, "server_error")), message=error.message)
        yield events.Failed(sequence_number=self._number(), response=self._now(status="failed", error=failure, store=False))

    def _now(self, **changed: Any) -> Response:
        return msgspec.structs.replace(self._response, output=[*self._output], usage=_usage(self._meter.usage()), **changed)

    def _number(self) -> int:
        return next(self._count)

    def _take(self, new: ChoiceDelta) -> Iterator[Event]:
        ended = new.finish_reason is not None
        self._tokens.take(self._speech.answers(new.logprobs or (), ended))
        for said in self._speech.events(new.text, ended):
            yield from self._say(said)
        if ended:
            yield from self._end(cut=new.finish_reason == "length")

    def _say(self, said: Thought | Said) -> Iterator[Event]:
        match said:
            case Thought(text):
                if not isinstance(self._growing, GrowingThought):
                    yield from self._turn(GrowingThought(self._place(), self._number, summarised=self._summarised))
                assert isinstance(self._growing, GrowingThought)
                yield from self._growing.add(text)
            case PlainText(text):
                if not isinstance(self._growing, GrowingMessage):
                    yield from self._turn(GrowingMessage(self._place(), self._number))
                assert isinstance(self._growing, GrowingMessage)
                yield from self._growing.add(text, self._tokens.of_text(text))
            case CallBegin(_, call_id, name):
                yield from self._turn(GrowingCall(self._place(), self._number, call_id, name))
            case CallArguments(_, text):
                self._tokens.of_call(text)
                assert isinstance(self._growing, GrowingCall)
                if text:
                    yield from self._growing.add(text)

    def _place(self) -> int:
        return len(self._output) + (self._growing is not None)

    def _turn(self, to: GrowingItem[Any]) -> Iterator[Event]:
        yield from self._close("completed")
        self._growing = to
        yield from to.begin()

    def _close(self, status: Status) -> Iterator[Event]:
        if self._growing is not None:
            yield from self._growing.end(status)
            self._output.append(self._growing.item(status))
            self._growing = None

    def _end(self, *, cut: bool) -> Iterator[Event]:
        """Whoever has ended without an answer has said nothing, in a message."""
        self._cut = cut
        silent = not cut and all(isinstance(item, ReasoningItem) for item in self._output)
        if silent and not isinstance(self._growing, GrowingMessage | GrowingCall):
            yield from self._turn(GrowingMessage(self._place(), self._number))
        if isinstance(self._growing, GrowingMessage) and (rest := self._tokens.rest()):
            yield from self._growing.add("", rest)
        yield from self._close("incomplete" if cut else "completed")


class _Tokens:
    """Log-probabilities of tokens that have not been told. aligned: some belong to calls and their marks, so those of a text
    are found by its bytes; otherwise all of them are the text's."""

    def __init__(self, names: TokenNames, *, aligned: bool) -> None:
        self._names = names
        self._aligned = aligned
        self._waiting: list[tuple[Entry | None, bytes]] = []  # None: told, but for a part of its bytes

    def take(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            token = next(iter(entry))
            self._waiting.append((entry, self._names.content(token, entry[token].decoded_token)))

    def of_text(self, text: str) -> list[TokenLogprob]:
        """Those of what is told now; those before it belong to nothing that is told."""
        sought, spelled = text.encode(), b"".join(content for _, content in self._waiting)
        begin = spelled.find(sought) if self._aligned else -1
        if begin < 0:
            return self.rest()
        told, end, place = [], begin + len(sought), 0
        while place < end:
            entry, content = self._waiting.pop(0)
            place += len(content)
            if place > begin and entry is not None:
                told.append(entry)
            if place > end:
                self._waiting.insert(0, (None, content[end - place :]))
        return self._shown(told)

    def of_call(self, text: str) -> None:
        """They are not told."""
        if text and text.encode() in b"".join(content for _, content in self._waiting):
            self.of_text(text)

    def rest(self) -> list[TokenLogprob]:
        now, self._waiting = self._waiting, []
        return self._shown([entry for entry, _ in now if entry is not None])

    def _shown(self, entries: list[Entry]) -> list[TokenLogprob]:
        return chat_logprobs(entries, self._names).content if entries else []


def _usage(usage: Usage) -> ResponseUsage:
    details = usage.completion_tokens_details
    thought = details.reasoning_tokens if isinstance(details, CompletionTokens) else 0
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputDetails(reasoning_tokens=thought),
        total_tokens=usage.total_tokens,
    )

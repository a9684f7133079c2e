"""A request's way to the service, and its output's way back, whole or as it comes: what completions and chat have in common.

    body ──read──▶ request ──accept──▶ Accepted ──▶ Telling ◀──deltas── service
                                                       └──whole──▶ a response's record,  or ──parts, chunk──▶ encoded events

A door whose answers have another shape turns its requests into these, and tells what `accept` and `deltas` give in its own way.
Knows nothing of HTTP: a request's record comes in, a response's record or encoded events go out.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
from msgspec import UnsetType

from deploy.config.serve import ServeConfig
from deploy.doors.access import Caller
from deploy.doors.dialects.reasoning.reasoning import ReasoningFormat, Thinking
from deploy.doors.dialects.tools.formats import unenforced
from deploy.doors.dialects.tools.grammars import Grammars
from deploy.doors.dialects.tools.tools import Tools
from deploy.doors.openai.answers.gathering import UsageMeter, WholePrompt
from deploy.doors.openai.answers.logprobs import TokenNames
from deploy.doors.openai.answers.records import ChatChunk, ChatCompletion, Completion, Usage
from deploy.doors.openai.requests.schemas import GenerationRequest, StreamOptions
from deploy.doors.openai.streams.marks import MOST_CHOICES, Mark, check_known, digest, read_mark
from deploy.doors.openai.streams.sse import event
from deploy.doors.warnings import Warnings
from deploy.frontend.errors import RequestError
from deploy.frontend.generation.choice import NOTHING_TOLD, Told
from deploy.frontend.outputs import ChoiceDelta, OutputDelta
from deploy.frontend.service.service import Service
from deploy.text.content import Content, PromptError
from deploy.text.prompts import Prompt, Terms
from deploy.text.tokenizer import Tokenizer
from scheduler.protocol.sampling import SamplingParams

R = TypeVar("R", bound=GenerationRequest)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request comes to, read from top to bottom by its path. tools: what the model may call; field: of the request, that
    asks for the grammar in `params`."""

    contents: Sequence[Content]
    params: SamplingParams
    terms: Terms
    tools: Tools | None
    field: str


@dataclass(frozen=True, slots=True)
class Accepted(Generic[R]):
    """A request as the service takes it. tools: what the model may call, to find its calls in the output; thinking: how it
    thinks, to find its thoughts."""

    request: R
    prompts: list[Prompt]
    tools: Tools | None
    thinking: Thinking | None


@dataclass(eq=False)
class Telling(ABC, Generic[R]):
    """How the output of one request is told, of which it has what `Accepted` has. heading: what every response and chunk of it
    says: id, created, model."""

    request: R
    prompts: list[Prompt]
    tools: Tools | None
    thinking: Thinking | None
    heading: dict[str, Any]
    tokenizer: Tokenizer | None

    @cached_property
    def names(self) -> TokenNames:
        return TokenNames(self.tokenizer)

    def wanted(self, delta: OutputDelta) -> OutputDelta:
        """What the request wants of it: is counted, and told."""
        return delta

    @abstractmethod
    def whole(self, outputs: Sequence[WholePrompt], usage: Usage) -> Completion | ChatCompletion:
        """The response's record."""

    @abstractmethod
    def parts(self, position: int, delta: OutputDelta) -> Iterable[Any]:
        """Choices of chunks with what is new of the prompt at `position`."""

    def turns(self, number: int) -> int:  # noqa: ARG002
        """How many turns of a choice, of thoughts and answers, have begun. One part of a delta is of one turn."""
        return 0

    def pass_over(self, number: int, turns: int) -> None:
        """The client has had so many turns of a choice whole: `parts` leaves them out."""

    @abstractmethod
    def chunk(self, choices: list[Any], usage: Usage | UnsetType | None) -> Completion | ChatChunk:
        """The record of an event."""


class StreamWriter:
    """Encodes the events of one stream. mark: how far it has been told, and is from now on. with_ids: each event has one."""

    def __init__(
        self, answer: Telling[Any], mark: Mark, options: StreamOptions, meter: UsageMeter, *, with_ids: bool
    ) -> None:
        self._answer = answer
        self._mark = mark
        self._options = options
        self._with_ids = with_ids and len(mark.choices) <= MOST_CHOICES
        self._meter = meter
        for number, choice in enumerate(mark.choices):
            if choice.turns:
                answer.pass_over(number, choice.turns)
            if choice.begun and choice.told == NOTHING_TOLD:
                self._pass_over(number)

    def write(self, position: int, delta: OutputDelta) -> bytes:
        """The events of what is new; what the client has is passed over. Errors: RequestError if that is not what it has."""
        self._meter.take(delta)
        usage, mark = self._meter.shown(self._options), self._mark
        if not self._with_ids:
            return b"".join(event(self._answer.chunk([part], usage)) for part in self._answer.parts(position, delta))
        if delta.seed is not None:
            mark.seeds[position] = delta.seed
        events: list[bytes] = []
        if not delta.choices:  # log-probabilities of the prompt alone, which are told with the first choice
            events += [event(self._answer.chunk([part], usage)) for part in self._answer.parts(position, delta)]
        for new in delta.choices:
            choice = mark.choices[position * self._choices + new.index]
            parts = [*self._answer.parts(position, delta if len(delta.choices) == 1 else replace(delta, choices=[new]))]
            if new.known:
                check_known(choice, new)
                continue
            for after, part in zip(range(len(parts) - 1, 0, -1), parts, strict=False):
                choice.begun, choice.turns = True, max(choice.turns, self._answer.turns(new.index) - after)
                events.append(event(self._answer.chunk([part], usage), mark.id()))
            choice.advance(new)
            events += [event(self._answer.chunk([part], usage), mark.id()) for part in parts[-1:]]
        return b"".join(events)

    def last(self) -> bytes:
        """The usage of the whole."""
        self._mark.whole = True
        return event(self._answer.chunk([], self._meter.usage()), self._mark.id() if self._with_ids else b"")

    @property
    def _choices(self) -> int:
        """Of each prompt."""
        return self._answer.prompts[0].params.n

    def _pass_over(self, number: int) -> None:
        """What comes before the tokens of a choice has been told, and none of them."""
        position, index = divmod(number, self._choices)
        nothing = OutputDelta([ChoiceDelta(index, "", [], None, None, None)], False, None, None, [])
        for _ in self._answer.parts(position, nothing):
            pass


class Endpoint(ABC, Generic[R]):
    """One path of one service."""

    id_prefix: ClassVar[str]
    """What a response's id begins with."""
    prompt_field: ClassVar[str]
    answer: Callable[..., Telling[R]]

    def __init__(self, service: Service, config: ServeConfig, grammars: Grammars) -> None:
        self._service = service
        self._config = config
        self._grammars = grammars
        self._reasoning: ReasoningFormat | None = None
        """How outputs may begin with thoughts."""

    async def whole(self, request: R, caller: Caller, warnings: Warnings) -> Completion | ChatCompletion:
        """warnings: are told what the client should know beside the answer. Errors: RequestError."""
        answer = await self._begin(request, caller, int(time.time()), warnings)
        meter = self._meter(answer)
        outputs = [WholePrompt(prompt.params.n) for prompt in answer.prompts]
        async with aclosing(self.deltas(answer.prompts, caller, gathered=True)) as deltas:
            async for position, delta in deltas:
                wanted = answer.wanted(delta)
                meter.take(wanted)
                outputs[position].take(wanted)
        return answer.whole(outputs, meter.usage())

    async def events(
        self, request: R, caller: Caller, warnings: Warnings, last_id: str | None = None, *, with_ids: bool = False
    ) -> AsyncGenerator[bytes, None]:
        """A piece of bytes for each delta. warnings: are told all before the first. last_id: of the last event that the caller
        has of the same request's stream, which goes on behind it. with_ids: events have some. Errors: RequestError."""
        with_ids = with_ids or last_id is not None
        mark = self._mark(request, caller, last_id) if with_ids else Mark(0, int(time.time()))
        answer = await self._begin(request, caller, mark.created, warnings)
        options = request.stream_options or StreamOptions()
        if last_id is None:
            mark.begin(answer.prompts)
        else:
            answer.prompts = mark.seeded(answer.prompts)
            if mark.whole or (all(choice.ended for choice in mark.choices) and not options.include_usage):
                return
        writer = StreamWriter(answer, mark, options, self._meter(answer), with_ids=with_ids)
        told = mark.told(answer.prompts) if with_ids else ()
        async with aclosing(self.deltas(answer.prompts, caller, told)) as deltas:
            async for position, delta in deltas:
                if data := writer.write(position, answer.wanted(delta)):
                    yield data
        if options.include_usage:
            yield writer.last()

    def _mark(self, request: R, caller: Caller, last_id: str | None) -> Mark:
        """Errors: RequestError."""
        owner = (self.id_prefix, self._service.model.name, caller.account, caller.request_id)
        asked = digest(*map(str.encode, owner), msgspec.json.encode(request))
        return Mark(asked, int(time.time())) if last_id is None else read_mark(last_id, asked)

    async def accept(self, request: R, caller: Caller, warnings: Warnings) -> Accepted[R]:
        """Prompts one after the other, so that many of one request hold up nobody else's. Errors: RequestError of the first
        that has one; the rest is not read."""
        try:
            asked = self._read(request, caller, warnings)
            prompts = [await self._service.prompt(content, asked.params, asked.terms) for content in asked.contents]
        except PromptError as error:
            field = error.field and self._called(request, error.field)
            raise RequestError.of_prompt(error, field or self.prompt_field) from None
        thinking = None if self._reasoning is None else self._reasoning.thinking(prompts[0].token_ids)
        if (grammar := asked.params.grammar) is not None:
            if thinking is not None:
                preamble = thinking.preamble if asked.tools is None else thinking.call_preamble
                grammar = msgspec.structs.replace(grammar, preamble=preamble)
                params = msgspec.structs.replace(asked.params, grammar=grammar)
                prompts = [replace(prompt, params=params) for prompt in prompts]
            for what in await self._grammars.check(grammar, asked.field, caller.account):
                warnings.add(unenforced(asked.field, what))
        return Accepted(request, prompts, asked.tools, thinking)

    def deltas(
        self, prompts: Sequence[Prompt], caller: Caller, told: Sequence[Sequence[Told]] = (), *, gathered: bool = False
    ) -> AsyncGenerator[tuple[int, OutputDelta], None]:
        """What is new, with the position of its prompt, until all has been said; see `Service.generate`."""
        return self._service.generate(
            prompts, request_id=caller.request_id, traceparent=caller.traceparent, told=told, gathered=gathered
        )

    def _meter(self, answer: Telling[R]) -> UsageMeter:
        return UsageMeter(answer.prompts, answer.thinking, reasons=self._config.miss_reasons)

    async def _begin(self, request: R, caller: Caller, created: int, warnings: Warnings) -> Telling[R]:
        """created: seconds since 1970. Errors: RequestError."""
        took = await self.accept(request, caller, warnings)
        named = {"id": f"{self.id_prefix}-{caller.request_id}", "created": created, "model": self._service.model.name}
        return self.answer(took.request, took.prompts, took.tools, took.thinking, named, self._service.model.tokenizer)

    def _called(self, request: R, field: str) -> str:  # noqa: ARG002
        """What the request calls a sampling parameter."""
        return field

    @abstractmethod
    def _read(self, request: R, caller: Caller, warnings: Warnings) -> Asked:
        """Errors: RequestError, PromptError."""

"""A request's way to the service, and its output's way back, whole or as it comes: what completions and chat have in common.

    body ──read──▶ request ──begin──▶ Telling ◀──deltas── service
                                         └──whole──▶ a response's record,  or ──parts, chunk──▶ encoded events

Knows nothing of HTTP: a request's record comes in, a response's record or encoded events go out.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Generic, TypeVar

from msgspec import UnsetType

from deploy.config.serve import ServeConfig
from deploy.doors.access import Caller
from deploy.doors.openai import reading
from deploy.doors.openai.answers.gathering import UsageMeter, WholePrompt
from deploy.doors.openai.answers.logprobs import TokenNames
from deploy.doors.openai.answers.responses import ChatChunk, ChatCompletion, Completion, Usage
from deploy.doors.openai.schemas import GenerationRequest, StreamOptions
from deploy.doors.openai.sse import event
from deploy.doors.openai.tools.grammars import Grammars
from deploy.doors.openai.tools.tools import Tools
from deploy.frontend.errors import RequestError
from deploy.frontend.outputs import OutputDelta
from deploy.frontend.service import Service
from deploy.text.prompts import Content, Prompt, PromptError
from deploy.text.tokenizer import Tokenizer

R = TypeVar("R", bound=GenerationRequest)


class Telling(ABC, Generic[R]):
    """How the output of one request is told. heading: what every response and chunk of it says: id, created, model. tools: what
    the model may call, to find its calls in the output."""

    def __init__(
        self, request: R, heading: dict[str, Any], prompts: list[Prompt], tools: Tools | None, tokenizer: Tokenizer | None
    ) -> None:
        self.request = request
        self.heading = heading
        self.prompts = prompts
        self.tools = tools
        self.tokenizer = tokenizer
        self.names = TokenNames(tokenizer)

    @abstractmethod
    def whole(self, outputs: Sequence[WholePrompt], usage: Usage) -> Completion | ChatCompletion:
        """The response's record."""

    @abstractmethod
    def parts(self, position: int, delta: OutputDelta) -> Iterable[Any]:
        """Choices of chunks with what is new of the prompt at `position`."""

    @abstractmethod
    def chunk(self, choices: list[Any], usage: Usage | UnsetType | None) -> Completion | ChatChunk:
        """The record of an event."""


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

    async def whole(self, request: R, caller: Caller) -> Completion | ChatCompletion:
        """Errors: RequestError."""
        answer = await self._begin(request, caller)
        meter, outputs = UsageMeter(answer.prompts), [WholePrompt(prompt.params.n) for prompt in answer.prompts]
        with self._service.logprobs.account() as account:
            async with aclosing(self._deltas(answer, caller)) as deltas:
                async for position, delta in deltas:
                    meter.take(delta)
                    outputs[position].take(delta)
                    account.add(delta.logprobs, "logprobs")
        return answer.whole(outputs, meter.usage())

    async def events(self, request: R, caller: Caller) -> AsyncGenerator[bytes, None]:
        """A piece of bytes for each delta. Errors: RequestError."""
        answer = await self._begin(request, caller)
        meter, options = UsageMeter(answer.prompts), request.stream_options or StreamOptions()
        async with aclosing(self._deltas(answer, caller)) as deltas:
            async for position, delta in deltas:
                meter.take(delta)
                usage = meter.shown(options)
                if data := b"".join(event(answer.chunk([part], usage)) for part in answer.parts(position, delta)):
                    yield data
        if options.include_usage:
            yield event(answer.chunk([], meter.usage()))

    async def _begin(self, request: R, caller: Caller) -> Telling[R]:
        """Prompts one after the other, so that many of one request hold up nobody else's. Errors: RequestError of the first
        that has one; the rest is not read."""
        reading.check(request, self._service.model, self._config)
        tools = self._tools(request)
        grammar, asked_by = reading.format_asked(request)
        if tools is not None:
            grammar, asked_by = tools.grammar(grammar), "tools"
        await self._grammars.check(grammar, asked_by, caller.account)
        params = reading.sampling(request, grammar=grammar, **self._fields(request))
        terms = caller.terms(self._config, request.cache_salt or "", request.priority or 0, request.timeout, request.user)
        try:
            contents = self._contents(request, tools)
            prompts = [await self._service.prompt(content, params, terms) for content in contents]
        except PromptError as error:
            field = error.field and self._called(request, error.field)
            raise RequestError.of_prompt(error, field or self.prompt_field) from None
        named = {"id": f"{self.id_prefix}-{caller.request_id}", "created": int(time.time()), "model": self._service.model.name}
        return self.answer(request, named, prompts, tools, self._service.model.tokenizer)

    def _deltas(self, answer: Telling[R], caller: Caller) -> AsyncGenerator[tuple[int, OutputDelta], None]:
        return self._service.generate(answer.prompts, request_id=caller.request_id, traceparent=caller.traceparent)

    def _tools(self, request: R) -> Tools | None:  # noqa: ARG002
        """What the model may call. Errors: RequestError."""
        return None

    def _called(self, request: R, field: str) -> str:  # noqa: ARG002
        """What the request calls a sampling parameter."""
        return field

    @abstractmethod
    def _fields(self, request: R) -> dict[str, Any]:
        """Sampling parameters that not all requests call the same. Errors: RequestError."""

    @abstractmethod
    def _contents(self, request: R, tools: Tools | None) -> Sequence[Content]:
        """Of each prompt. Errors: RequestError, PromptError."""

"""`/v1/chat/completions`: a conversation in, the assistant's answer out, whole or as it comes.

Knows nothing of HTTP: a request's record comes in, a response's record or encoded events go out.
"""

import uuid
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from msgspec import UNSET

from deploy.config.serve import ServeConfig
from deploy.doors.access import Caller
from deploy.doors.openai import reading
from deploy.doors.openai.answers.gathering import UsageMeter, WholeChoice, gather
from deploy.doors.openai.answers.logprobs import TokenNames, chat_logprobs, vllm_prompt_logprobs
from deploy.doors.openai.answers.responses import (
    CalledFunction,
    CalledTool,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
)
from deploy.doors.openai.jobs import Job
from deploy.doors.openai.messages import for_template
from deploy.doors.openai.schemas import ChatRequest, StreamOptions
from deploy.doors.openai.sse import event
from deploy.doors.openai.tools.grammars import Grammars
from deploy.doors.openai.tools.tool_calls import CallArguments, CallBegin, Event, PlainText
from deploy.doors.openai.tools.tools import ToolDialect, Tools, read_tools
from deploy.frontend.errors import RequestError
from deploy.frontend.outputs import ChoiceDelta
from deploy.frontend.service import Service
from deploy.text.prompts import Conversation, PromptError
from scheduler.protocol.sampling import Grammar, SamplingParams


class Chat:
    """Chat completions of one service."""

    def __init__(self, service: Service, config: ServeConfig, grammars: Grammars) -> None:
        self._service = service
        self._config = config
        self._grammars = grammars
        self._names = TokenNames(service.model.tokenizer)
        self._dialect = ToolDialect.of(service.model.tokenizer, config.tool_format)

    async def job(self, request: ChatRequest, caller: Caller) -> Job:
        """Errors: RequestError."""
        reading.check(request, self._service.model, self._config)
        tools = read_tools(request.tools, request.tool_choice, request.parallel_tool_calls, self._dialect)
        grammar, asked_by = reading.format_asked(request)
        if tools is not None:
            grammar, asked_by = tools.grammar(grammar), "tools"
        await self._grammars.check(grammar, asked_by, caller.account)
        params = self._params(request, grammar)
        terms = caller.terms(self._config, request.cache_salt or "", request.priority or 0, request.timeout, request.user)
        messages = for_template(request.messages)
        conversation = Conversation(messages, None if tools is None else tools.specs, request.chat_template_kwargs)
        try:
            prompt = await self._service.prompt(conversation, params, terms)
        except PromptError as error:
            raise RequestError.of_prompt(error, "messages") from None
        return Job.of(caller, "chatcmpl", self._service.model.name, [prompt], tools)

    async def whole(self, request: ChatRequest, job: Job) -> ChatCompletion:
        """Errors: RequestError."""
        (answer,), usage = await gather(job.deltas(self._service), job)
        return ChatCompletion(
            id=job.id,
            created=job.created,
            model=job.model,
            choices=[self._choice(index, choice, request, job.tools) for index, choice in enumerate(answer.choices)],
            usage=usage,
            prompt_logprobs=vllm_prompt_logprobs(answer.logprobs) if request.prompt_logprobs is not None else UNSET,
        )

    async def events(self, request: ChatRequest, job: Job) -> AsyncGenerator[bytes, None]:
        """A piece of bytes for each delta. Errors: RequestError."""
        options, meter = request.stream_options or StreamOptions(), UsageMeter(job.prompt_tokens)
        speeches: dict[int, _Speech] = {}

        def chunk(*choices: ChatChunkChoice) -> bytes:
            usage = meter.shown(options, last=not choices)
            return event(ChatChunk(id=job.id, created=job.created, model=job.model, choices=list(choices), usage=usage))

        async with aclosing(job.deltas(self._service)) as deltas:
            async for _, delta in deltas:
                meter.take(delta)
                data = b""
                for new in delta.choices:
                    if new.index not in speeches:
                        speeches[new.index] = _Speech(job.tools)
                        opening = ChatDelta(role="assistant", content="")
                        data += chunk(ChatChunkChoice(index=new.index, delta=opening))
                    if (part := self._part(new, speeches[new.index], request)) is not None:
                        data += chunk(part)
                if data:
                    yield data
        if options.include_usage:
            yield chunk()

    def _params(self, request: ChatRequest, grammar: Grammar | None) -> SamplingParams:
        if request.top_logprobs is not None and not request.logprobs:
            raise RequestError.invalid("top_logprobs goes with logprobs=true: set it", "top_logprobs")
        max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        return reading.sampling(
            request,
            self._service.parser,
            n=request.n or 1,
            max_tokens=max_tokens,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            prompt_logprobs=request.prompt_logprobs,
            grammar=grammar,
        )

    def _choice(self, index: int, choice: WholeChoice, request: ChatRequest, tools: Tools | None) -> ChatChoice:
        speech = _Speech(tools)
        content, calls = speech.told(choice.text, ended=True)
        message = ChatMessage(content=None if calls and not content else content, tool_calls=calls or UNSET)
        return ChatChoice(
            index=index,
            message=message,
            logprobs=chat_logprobs(choice.logprobs, self._names) if request.logprobs else None,
            finish_reason=speech.finish_reason(choice.finish_reason),
            stop_reason=choice.stop_reason,
        )

    def _part(self, new: ChoiceDelta, speech: "_Speech", request: ChatRequest) -> ChatChunkChoice | None:
        """None: there is nothing to tell yet."""
        ended = new.finish_reason is not None
        content, calls = speech.told(new.text, ended, in_parts=True)
        if not (content or calls or new.logprobs or ended):
            return None
        return ChatChunkChoice(
            index=new.index,
            delta=ChatDelta(content=content or UNSET, tool_calls=calls or UNSET),
            logprobs=chat_logprobs(new.logprobs or (), self._names) if request.logprobs else None,
            finish_reason=speech.finish_reason(new.finish_reason),
            stop_reason=new.stop_reason if ended else UNSET,
        )


class _Speech:
    """One choice's text, told as content and calls of tools."""

    def __init__(self, tools: Tools | None) -> None:
        self._parser = None if tools is None else tools.parser(lambda: f"call_{uuid.uuid4().hex}")

    def told(self, text: str, ended: bool, in_parts: bool = False) -> tuple[str, list[CalledTool]]:
        """What is new. in_parts: calls are numbered, since more of them may follow."""
        if self._parser is None:
            return text, []
        events = self._parser.push(text)
        return _sorted(events + self._parser.flush() if ended else events, in_parts)

    def finish_reason(self, reason: str | None) -> str | None:
        """An output that has stopped with a call has stopped for it."""
        called = self._parser is not None and self._parser.called
        return "tool_calls" if reason == "stop" and called else reason


def _sorted(events: Iterable[Event], in_parts: bool) -> tuple[str, list[CalledTool]]:
    content = ""
    begins: dict[int, CallBegin] = {}
    arguments: dict[int, str] = {}
    for each in events:
        match each:
            case PlainText(text):
                content += text
            case CallBegin(index):
                begins[index], arguments[index] = each, ""
            case CallArguments(index, text):
                arguments[index] = arguments.get(index, "") + text
    return content, [_call(index, begins.get(index), text, in_parts) for index, text in arguments.items()]


def _call(index: int, begin: CallBegin | None, arguments: str, in_parts: bool) -> CalledTool:
    """begin: None if the call has been told before."""
    number = index if in_parts else UNSET
    if begin is None:
        return CalledTool(index=number, function=CalledFunction(arguments=arguments))
    return CalledTool(index=number, id=begin.id, type="function", function=CalledFunction(name=begin.name, arguments=arguments))

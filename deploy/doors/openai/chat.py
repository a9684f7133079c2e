"""`/v1/chat/completions`: a conversation in, the assistant's answer out. Knows nothing of HTTP."""

import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from msgspec import UNSET, UnsetType

from deploy.config.serve import ServeConfig
from deploy.doors.openai.answers.gathering import WholeChoice, WholePrompt
from deploy.doors.openai.answers.logprobs import chat_logprobs, vllm_prompt_logprobs
from deploy.doors.openai.answers.responses import (
    CalledFunction,
    CalledTool,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    Usage,
)
from deploy.doors.openai.endpoint import Endpoint, Telling
from deploy.doors.openai.schemas import ChatRequest
from deploy.doors.openai.tools.events import CallArguments, CallBegin, Event, PlainText
from deploy.doors.openai.tools.grammars import Grammars
from deploy.doors.openai.tools.tools import ToolDialect, Tools, read_tools
from deploy.frontend.errors import RequestError
from deploy.frontend.outputs import ChoiceDelta, OutputDelta
from deploy.frontend.service import Service
from deploy.text.messages import for_template
from deploy.text.prompts import Conversation


class _ChatTelling(Telling[ChatRequest]):
    """One conversation's. A choice's first chunk says whose words they are."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._speeches: dict[int, _Speech] = {}

    def whole(self, outputs: Sequence[WholePrompt], usage: Usage) -> ChatCompletion:
        (output,), asked = outputs, self.request.prompt_logprobs is not None
        choices = [self._choice(index, choice) for index, choice in enumerate(output.choices)]
        prompt_logprobs = vllm_prompt_logprobs(output.logprobs) if asked else UNSET
        return ChatCompletion(**self.heading, choices=choices, usage=usage, prompt_logprobs=prompt_logprobs)

    def parts(self, position: int, delta: OutputDelta) -> Iterator[ChatChunkChoice]:  # noqa: ARG002
        for new in delta.choices:
            if new.index not in self._speeches:
                self._speeches[new.index] = _Speech(self.tools)
                yield ChatChunkChoice(index=new.index, delta=ChatDelta(role="assistant", content=""))
            if (part := self._part(new, self._speeches[new.index])) is not None:
                yield part

    def chunk(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatChunk:
        return ChatChunk(**self.heading, choices=choices, usage=usage)

    def _choice(self, index: int, choice: WholeChoice) -> ChatChoice:
        speech = _Speech(self.tools)
        content, calls = speech.told(choice.text, ended=True)
        return ChatChoice(
            index=index,
            message=ChatMessage(content=None if calls and not content else content, tool_calls=calls or UNSET),
            logprobs=chat_logprobs(choice.logprobs, self.names) if self.request.logprobs else None,
            finish_reason=speech.finish_reason(choice.finish_reason),
            stop_reason=choice.stop_reason,
        )

    def _part(self, new: ChoiceDelta, speech: "_Speech") -> ChatChunkChoice | None:
        """None: there is nothing to tell yet."""
        ended = new.finish_reason is not None
        content, calls = speech.told(new.text, ended, in_parts=True)
        if not (content or calls or new.logprobs or ended):
            return None
        return ChatChunkChoice(
            index=new.index,
            delta=ChatDelta(content=content or UNSET, tool_calls=calls or UNSET),
            logprobs=chat_logprobs(new.logprobs or (), self.names) if self.request.logprobs else None,
            finish_reason=speech.finish_reason(new.finish_reason),
            stop_reason=new.stop_reason if ended else UNSET,
        )


class Chat(Endpoint[ChatRequest]):
    """Chat completions of one service."""

    id_prefix, prompt_field, answer = "chatcmpl", "messages", _ChatTelling

    def __init__(self, service: Service, config: ServeConfig, grammars: Grammars) -> None:
        super().__init__(service, config, grammars)
        self._dialect = ToolDialect.of(service.model.tokenizer, config.tool_parser)

    def _tools(self, request: ChatRequest) -> Tools | None:
        return read_tools(request.tools, request.tool_choice, request.parallel_tool_calls, self._dialect)

    def _called(self, request: ChatRequest, field: str) -> str:
        return "max_completion_tokens" if field == "max_tokens" and request.max_completion_tokens is not None else field

    def _fields(self, request: ChatRequest) -> dict[str, Any]:
        if request.top_logprobs is not None and not request.logprobs:
            raise RequestError.invalid("top_logprobs goes with logprobs=true: set it", "top_logprobs")
        return {
            "n": request.n or 1,
            "max_tokens": request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens,
            "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
            "prompt_logprobs": request.prompt_logprobs,
        }

    def _contents(self, request: ChatRequest, tools: Tools | None) -> list[Conversation]:
        specs = None if tools is None else tools.specs
        return [Conversation(for_template(request.messages), specs, request.chat_template_kwargs)]


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

"""`/v1/chat/completions`: a conversation in, the assistant's answer out. Knows nothing of HTTP."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import UNSET, UnsetType

from deploy.config.serve import ServeConfig
from deploy.doors.access import Caller
from deploy.doors.dialects.reasoning.reasoning import ReasoningFormat
from deploy.doors.dialects.tools.grammars import Grammars
from deploy.doors.dialects.tools.tools import ToolDialect, Tools, read_tools
from deploy.doors.openai.answers.gathering import WholeChoice, WholePrompt
from deploy.doors.openai.answers.logprobs import Entry, chat_logprobs, vllm_prompt_logprobs
from deploy.doors.openai.answers.records import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Usage,
)
from deploy.doors.openai.answers.speech import Said, Speech
from deploy.doors.openai.generation.endpoint import Asked, Endpoint, Telling
from deploy.doors.openai.requests import reading
from deploy.doors.openai.requests.schemas import ChatRequest
from deploy.doors.warnings import Warnings
from deploy.frontend.errors import RequestError
from deploy.frontend.outputs import ChoiceDelta, OutputDelta
from deploy.frontend.service.service import Service
from deploy.text.content import Conversation, PromptError, for_template

NO_EFFORT = "none"


@dataclass(eq=False)
class _ChatTelling(Telling[ChatRequest]):
    """One conversation's. A choice's first chunk says whose words they are."""

    _speeches: dict[int, Speech] = field(default_factory=dict)
    _had: dict[int, int] = field(default_factory=dict)

    def whole(self, outputs: Sequence[WholePrompt], usage: Usage) -> ChatCompletion:
        (output,), asked = outputs, self.request.prompt_logprobs is not None
        choices = [self._choice(index, choice) for index, choice in enumerate(output.choices)]
        prompt_logprobs = vllm_prompt_logprobs(output.logprobs) if asked else UNSET
        return ChatCompletion(**self.heading, choices=choices, usage=usage, prompt_logprobs=prompt_logprobs)

    def parts(self, position: int, delta: OutputDelta) -> Iterator[ChatChunkChoice]:  # noqa: ARG002
        for new in delta.choices:
            if new.index not in self._speeches:
                self._speeches[new.index] = Speech(self.tools, self.thinking, self._had.get(new.index, 0))
                yield ChatChunkChoice(index=new.index, delta=ChatDelta(role="assistant", content=""))
            yield from self._parts(new, self._speeches[new.index])

    def turns(self, number: int) -> int:
        return self._speeches[number].turns

    def pass_over(self, number: int, turns: int) -> None:
        self._had[number] = turns

    def chunk(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatChunk:
        return ChatChunk(**self.heading, choices=choices, usage=usage)

    def _choice(self, index: int, choice: WholeChoice) -> ChatChoice:
        speech = Speech(self.tools, self.thinking)
        said = speech.told(choice.text, ended=True)
        reasoning: str | UnsetType | None = "".join(part.reasoning for part in said) or None
        content, calls = "".join(part.content for part in said), [call for part in said for call in part.calls]
        if self.thinking is None:
            reasoning = UNSET
        return ChatChoice(
            index=index,
            message=ChatMessage(
                content=None if calls and not content else content, reasoning=reasoning, reasoning_content=reasoning,
                tool_calls=calls or UNSET,
            ),
            logprobs=self._logprobs(speech.answers(choice.logprobs, ended=True)),
            finish_reason=speech.finish_reason(choice.finish_reason),
            stop_reason=choice.stop_reason,
        )

    def _parts(self, new: ChoiceDelta, speech: Speech) -> Iterator[ChatChunkChoice]:
        """Thought and answer each by themselves: many clients look for the one only where the other is not. What is said once
        comes with the last."""
        ended = new.finish_reason is not None
        said = speech.told(new.text, ended, in_parts=True, known=new.known)
        entries = speech.answers(new.logprobs or (), ended)
        *before, last = (_delta(part) for part in said or [Said()])
        yield from (ChatChunkChoice(index=new.index, delta=delta) for delta in before)
        if said or entries or ended:
            yield ChatChunkChoice(
                index=new.index,
                delta=last,
                logprobs=self._logprobs(entries),
                finish_reason=speech.finish_reason(new.finish_reason),
                stop_reason=new.stop_reason if ended else UNSET,
            )

    def _logprobs(self, entries: Sequence[Entry]) -> ChatLogprobs | None:
        return chat_logprobs(entries, self.names) if self.request.logprobs else None


class Chat(Endpoint[ChatRequest]):
    """Chat completions of one service."""

    id_prefix, prompt_field, answer = "chatcmpl", "messages", _ChatTelling

    def __init__(self, service: Service, config: ServeConfig, grammars: Grammars) -> None:
        super().__init__(service, config, grammars)
        self._dialect = ToolDialect.of(service.model.tokenizer, config.tool_parser)
        self._reasoning = ReasoningFormat.of(service.model.tokenizer, config.reasoning_parser)

    async def prompt_ids(self, request: ChatRequest) -> list[int]:
        """What the model would be given. Errors: RequestError."""
        reading.check_model(request.model, self._service.model)
        try:
            return (await self._service.prompt(_conversation(request, self._tools(request)))).token_ids
        except PromptError as error:
            raise RequestError.of_prompt(error, error.field or self.prompt_field) from None

    def _read(self, request: ChatRequest, caller: Caller, warnings: Warnings) -> Asked:
        reading.check(request, self._service.model, self._config)
        tools = self._tools(request)
        grammar, field = reading.format_asked(request, warnings)
        if tools is not None:
            grammar, field = tools.grammar(grammar, warnings), "tools"
        if request.top_logprobs and not request.logprobs:
            raise RequestError.invalid("top_logprobs goes with logprobs=true: set it", "top_logprobs")
        params = reading.sampling(
            request,
            grammar=grammar,
            n=request.n or 1,
            max_tokens=request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            prompt_logprobs=request.prompt_logprobs,
        )
        terms = reading.terms(request, caller, self._config)
        return Asked([_conversation(request, tools)], params, terms, tools, field)

    def _tools(self, request: ChatRequest) -> Tools | None:
        """What the model may call. Errors: RequestError."""
        if request.tools is None and request.tool_choice is None:
            return None
        return read_tools(request.tools, request.tool_choice, request.parallel_tool_calls, self._dialect)

    def _called(self, request: ChatRequest, field: str) -> str:
        return "max_completion_tokens" if field == "max_tokens" and request.max_completion_tokens is not None else field


def _conversation(request: ChatRequest, tools: Tools | None) -> Conversation:
    """Errors: PromptError."""
    specs = None if tools is None else tools.specs
    return Conversation(for_template(request.messages), specs, _template_kwargs(request))


def _template_kwargs(request: ChatRequest) -> dict[str, Any] | None:
    """A template reads of it what it knows. No effort at all is also said under the names of Qwen and GLM, and of DeepSeek."""
    effort = request.reasoning_effort
    if effort is None:
        return request.chat_template_kwargs
    not_at_all = {"enable_thinking": False, "thinking": False} if effort == NO_EFFORT else {}
    return {"reasoning_effort": effort, **not_at_all, **(request.chat_template_kwargs or {})}


def _delta(said: Said) -> ChatDelta:
    reasoning = said.reasoning or UNSET
    return ChatDelta(
        content=said.content or UNSET, reasoning=reasoning, reasoning_content=reasoning, tool_calls=said.calls or UNSET
    )

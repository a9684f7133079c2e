"""`/v1/messages` and `/v1/messages/count_tokens`: chat, asked and told in Anthropic's words. Knows nothing of HTTP.

    MessagesRequest ──as_chat──▶ ChatRequest ──Chat.accept──▶ prompt ──deltas──▶ blocks, whole or as events
"""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace

import msgspec

from deploy.config.serve import ServeConfig
from deploy.doors.access import Caller
from deploy.doors.anthropic.reading import as_chat, in_own_words, marks_cache
from deploy.doors.anthropic.records import (
    MessageAnswer,
    MessageDelta,
    MessageEnd,
    MessageStart,
    MessageStop,
    MessageUsage,
    OutputTokensDetails,
    Ping,
    StreamEvent,
    TokenCount,
    encoded,
)
from deploy.doors.anthropic.schemas import CountTokensRequest, MessagesRequest
from deploy.doors.anthropic.telling import BlockWriter, stop_reason, whole_blocks
from deploy.doors.dialects.tools.grammars import Grammars
from deploy.doors.openai.answers.gathering import UsageMeter, WholeChoice
from deploy.doors.openai.answers.speech import Speech
from deploy.doors.openai.generation.chat import Chat
from deploy.doors.openai.generation.endpoint import Accepted
from deploy.doors.openai.requests.schemas import ChatRequest
from deploy.doors.warnings import Warnings
from deploy.frontend.errors import RequestError
from deploy.frontend.outputs import ChoiceDelta, OutputDelta
from deploy.frontend.service.service import Service
from deploy.text.prompts import Prompt

ID_PREFIX, CALL_PREFIX = "msg_", "toolu_"


class _Message:
    """One message on its way: what it was asked for as, and what has come of it."""

    def __init__(self, request: MessagesRequest, accepted: Accepted[ChatRequest], id: str, model: str) -> None:
        """accepted: the same request as chat's. id, model: what the message says of itself."""
        self._request = request
        self._id, self._model = id, model
        self._speech = Speech(accepted.tools, accepted.thinking, id_prefix=CALL_PREFIX)
        self._meter = UsageMeter(accepted.prompts, accepted.thinking)
        self._shows_thoughts = request.thinking is None or request.thinking.display != "omitted"
        self._blocks = BlockWriter(shows_thoughts=self._shows_thoughts)
        self._begun = False

    def count(self, delta: OutputDelta) -> None:
        self._meter.take(delta)

    def whole(self, choice: WholeChoice) -> MessageAnswer:
        """Of the whole output, all of which has been counted."""
        content = whole_blocks(self._speech.events(choice.text, ended=True), shows_thoughts=self._shows_thoughts)
        end = self._end(choice)
        return MessageAnswer(
            id=self._id, model=self._model, content=content, usage=self._usage(), stop_reason=end.stop_reason,
            stop_sequence=end.stop_sequence,
        )  # fmt: skip

    def events(self, delta: OutputDelta) -> Iterator[StreamEvent]:
        """What is new. The first of them tells the whole prompt as input: what of it was cached is known at the end."""
        if not self._begun:
            self._begun = True
            yield MessageStart(message=MessageAnswer(id=self._id, model=self._model, content=[], usage=self._first_usage()))
            yield Ping()
        self.count(delta)
        for new in delta.choices:
            ended = new.finish_reason is not None
            yield from self._blocks.write(self._speech.events(new.text, ended))
            if ended:
                yield from self._blocks.end()
                yield MessageDelta(delta=self._end(new), usage=self._usage())
                yield MessageStop()

    def _end(self, choice: WholeChoice | ChoiceDelta) -> MessageEnd:
        finish_reason = self._speech.finish_reason(choice.finish_reason)
        all_tokens = self._meter.usage().completion_tokens >= self._request.max_tokens
        reason, sequence = stop_reason(finish_reason, choice.stop_reason, all_tokens=all_tokens)
        return MessageEnd(stop_reason=reason, stop_sequence=sequence)

    def _first_usage(self) -> MessageUsage:
        prompt_tokens = self._meter.usage().prompt_tokens
        return MessageUsage(
            input_tokens=prompt_tokens, cache_creation_input_tokens=0, cache_read_input_tokens=0, output_tokens=0
        )

    def _usage(self) -> MessageUsage:
        """Where the client asks for a prefix to be kept, all that was computed is, but for the last token, which is computed
        whenever the same prompt comes."""
        usage = self._meter.usage()
        read = usage.prompt_tokens_details.cached_tokens
        computed = usage.prompt_tokens - read
        created = computed - 1 if marks_cache(self._request) else 0
        details = usage.completion_tokens_details
        return MessageUsage(
            input_tokens=computed - created,
            cache_creation_input_tokens=created,
            cache_read_input_tokens=read,
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(thinking_tokens=details.reasoning_tokens) if details else None,
        )


class Messages:
    """Messages of one service."""

    def __init__(self, service: Service, config: ServeConfig, grammars: Grammars) -> None:
        self._chat = Chat(service, config, grammars)
        self._model = service.model

    async def whole(self, request: MessagesRequest, caller: Caller, warnings: Warnings) -> MessageAnswer:
        """warnings: are told what the client should know beside the answer. Errors: RequestError."""
        prompts, message = await self._accept(request, caller, warnings)
        choice = WholeChoice()
        async with aclosing(self._chat.deltas(prompts, caller)) as deltas:
            async for _, delta in deltas:
                message.count(delta)
                for new in delta.choices:
                    choice.take(new)
        return message.whole(choice)

    async def events(self, request: MessagesRequest, caller: Caller, warnings: Warnings) -> AsyncGenerator[bytes, None]:
        """A piece of bytes for each delta. warnings: are told all before the first. Errors: RequestError."""
        prompts, message = await self._accept(request, caller, warnings)
        async with aclosing(self._chat.deltas(prompts, caller)) as deltas:
            async for _, delta in deltas:
                if data := b"".join(map(encoded, message.events(delta))):
                    yield data

    async def count(self, request: CountTokensRequest, warnings: Warnings) -> TokenCount:
        """Tokens of the prompt that the same request for a message would have. Errors: RequestError."""
        try:
            return TokenCount(input_tokens=len(await self._chat.prompt_ids(as_chat(request, warnings))))
        except RequestError as error:
            raise in_own_words(error) from None

    async def _accept(
        self, request: MessagesRequest, caller: Caller, warnings: Warnings
    ) -> tuple[Sequence[Prompt], _Message]:
        """The prompt is read without a bound on its output first: whoever asks for more than there is room for gets as much as
        fits. Errors: RequestError."""
        try:
            accepted = await self._chat.accept(as_chat(request, warnings), caller, warnings)
        except RequestError as error:
            raise in_own_words(error) from None
        (prompt,) = accepted.prompts
        if request.max_tokens <= self._model.limits.max_tokens - len(prompt.token_ids):
            prompt = replace(prompt, params=msgspec.structs.replace(prompt.params, max_tokens=request.max_tokens))
        return [prompt], _Message(request, accepted, f"{ID_PREFIX}{caller.request_id}", self._model.name)

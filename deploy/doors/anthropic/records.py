"""What clients of Anthropic's Messages get: a whole message, or the events of its stream.

Encoded by msgspec, which writes each record's tag as its `type`. Imports their base, and how events are framed.
"""

from typing import Any, Literal

import msgspec

from deploy.doors.openai.answers.records import Answer
from deploy.doors.openai.streams.sse import event


class TextBlock(Answer, frozen=True, kw_only=True, tag_field="type", tag="text"):
    """A part of the answer."""

    text: str = ""
    citations: None = None


class ThinkingBlock(Answer, frozen=True, kw_only=True, tag_field="type", tag="thinking"):
    """A thought. signature: `signatures.signature` of it."""

    thinking: str = ""
    signature: str = ""


class ToolUseBlock(Answer, frozen=True, kw_only=True, tag_field="type", tag="tool_use"):
    """A call. input: in a stream empty; it follows as text."""

    id: str
    name: str
    input: dict[str, Any] = msgspec.field(default_factory=dict)


Block = TextBlock | ThinkingBlock | ToolUseBlock


class OutputTokensDetails(Answer, frozen=True, kw_only=True):
    """thinking_tokens: output tokens of thoughts, the marks around them included."""

    thinking_tokens: int


class MessageUsage(Answer, frozen=True, kw_only=True):
    """Tokens of one request. The prompt's are the sum of the three: found in the cache; computed, and kept there because the
    request asked for it; and the others."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails | None = None
    service_tier: Literal["standard"] = "standard"


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class MessageAnswer(Answer, frozen=True, kw_only=True):
    """The assistant's message; at a stream's beginning without content."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Block]
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class TokenCount(Answer, frozen=True, kw_only=True):
    """Of a prompt."""

    input_tokens: int


# ---- events of a stream -----------------------------------------------------------------------------------------------


class MessageStart(Answer, frozen=True, kw_only=True, tag_field="type", tag="message_start"):
    message: MessageAnswer


class Ping(Answer, frozen=True, kw_only=True, tag_field="type", tag="ping"):
    """Nothing new, but the stream lives."""


class BlockStart(Answer, frozen=True, kw_only=True, tag_field="type", tag="content_block_start"):
    index: int
    content_block: Block


class TextDelta(Answer, frozen=True, kw_only=True, tag_field="type", tag="text_delta"):
    text: str


class ThinkingDelta(Answer, frozen=True, kw_only=True, tag_field="type", tag="thinking_delta"):
    thinking: str


class SignatureDelta(Answer, frozen=True, kw_only=True, tag_field="type", tag="signature_delta"):
    signature: str


class InputDelta(Answer, frozen=True, kw_only=True, tag_field="type", tag="input_json_delta"):
    partial_json: str


class BlockDelta(Answer, frozen=True, kw_only=True, tag_field="type", tag="content_block_delta"):
    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputDelta


class BlockStop(Answer, frozen=True, kw_only=True, tag_field="type", tag="content_block_stop"):
    index: int


class MessageEnd(Answer, frozen=True, kw_only=True):
    """Why the message ended."""

    stop_reason: StopReason
    stop_sequence: str | None = None


class MessageDelta(Answer, frozen=True, kw_only=True, tag_field="type", tag="message_delta"):
    """usage: of the whole, in place of what the beginning said."""

    delta: MessageEnd
    usage: MessageUsage


class MessageStop(Answer, frozen=True, kw_only=True, tag_field="type", tag="message_stop"):
    pass


StreamEvent = MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop


class ErrorDetails(Answer, frozen=True, kw_only=True):
    """type: one of Anthropic's words."""

    type: str
    message: str


class ErrorAnswer(Answer, frozen=True, kw_only=True, tag_field="type", tag="error"):
    """The body of every response that is not a success, and the event that ends a stream which failed."""

    error: ErrorDetails
    request_id: str | None = None


def encoded(content: StreamEvent | ErrorAnswer) -> bytes:
    """One server-sent event, named as its record's type is."""
    return event(content, name=str(content.__struct_config__.tag))

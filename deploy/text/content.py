"""What a prompt is made of: text, token ids, a pair of texts, or a conversation; and the messages of one, as every door reads
them and as a chat template does. Imports msgspec."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec


class PromptError(ValueError):
    """A prompt that cannot be served; the message says why and what to change. field: what is at fault, where it is a sampling
    parameter or a part of a conversation."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class PromptTooLong(PromptError):
    """It leaves the model no room for the output that is asked for."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt that the checkpoint's chat template writes. messages: as templates read them, content as text and a call's
    arguments as an object. tools: what the model may call, in OpenAI's form, for the template to show. template_kwargs: what
    else this template can be told. Errors: PromptError for one without messages."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.messages:
            raise PromptError('messages must be a list of {"role": ..., "content": ...} with at least one entry')


@dataclass(frozen=True, slots=True)
class TextPair:
    """Two texts that a classifier sees together, joined as the checkpoint's tokenizer joins pairs."""

    first: str
    second: str


Content = str | list[int] | Conversation | TextPair
"""Text, token ids, a conversation, or two texts."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An object in which an unknown field is an error."""


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a message. Other kinds than text are read only to be refused by their names."""

    type: str
    text: str | None = None


class FunctionCall(Record, frozen=True, kw_only=True):
    """arguments: a JSON object, as text."""

    name: str
    arguments: str


class ToolCall(Record, frozen=True, kw_only=True):
    """A call that the assistant made earlier in the conversation. index: as streams have it; not read."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | None = None


class Message(Record, frozen=True, kw_only=True):
    """One message, of any role. What clients get back in an answer, here or elsewhere, they may send again as it is, nulls
    included. reasoning, reasoning_content: the same thing, under the names that clients use. refusal: what an assistant said in
    place of content."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    function_call: None = None
    # ignored
    id: Any = None
    annotations: Any = None
    audio: Any = None
    provider_specific_fields: Any = None


def for_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Text parts are joined, fields that are null left out; a developer speaks as the system. Errors: PromptError with the path
    of the field."""
    return [_for_template(message, f"messages[{position}]") for position, message in enumerate(messages)]


def _for_template(message: Message, path: str) -> dict[str, Any]:
    thought = message.reasoning_content or message.reasoning or None
    content = message.refusal if message.content is None else message.content
    elsewhere = message.role == "assistant" and (thought or message.audio)
    if content is None and not message.tool_calls and not elsewhere:
        raise PromptError(f"{path} says nothing: give it content", f"{path}.content")
    if message.role == "tool" and message.tool_call_id is None:
        raise PromptError(f"{path}: say which call it answers, in tool_call_id", f"{path}.tool_call_id")
    shown = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _text(content or "", path),
        "tool_calls": [_call(call) for call in message.tool_calls or ()] or None,
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": thought,
        "reasoning": thought,
        # gpt-oss' template wants it so, and a call without content beside it
        "thinking": None if message.tool_calls and message.content else thought,
    }
    return {name: value for name, value in shown.items() if value is not None}


def _call(call: ToolCall) -> dict[str, Any]:
    """Its arguments as templates want them: an object, which they print themselves. What a model wrote need not be JSON: it is
    shown as it is."""
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = call.function.arguments
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}


def _text(content: str | list[ContentPart], path: str) -> str:
    if isinstance(content, str):
        return content
    return "".join(part_text(part.type, part.text, f"{path}.content[{at}]") for at, part in enumerate(content))


def part_text(kind: str, text: str | None, path: str, kinds: Collection[str] = ("text",)) -> str:
    """What a part of this kind says, as every door's messages have them. kinds: that are text. Errors: PromptError with the
    path."""
    if kind not in kinds:
        raise PromptError(f"{path} is of type {kind[:80]!r}: models served here read text parts only", path)
    if text is None:
        raise PromptError(f"{path} is of type {kind!r} and has no text: give it one", path)
    return text

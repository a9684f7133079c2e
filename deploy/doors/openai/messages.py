"""From OpenAI's messages to what a chat template reads. Imports the schemas; no HTTP."""

from typing import Any

import msgspec

from deploy.doors.openai.schemas import ContentPart, Message
from deploy.frontend.errors import RequestError
from deploy.text.prompts import Source


def chat_source(
    messages: list[Message], tools: list[dict[str, Any]] | None, template_kwargs: dict[str, Any] | None, salt: str | None = None
) -> Source:
    """A conversation as `Service.prompt` takes it. tools: for the template to show. Errors: RequestError."""
    return {
        "messages": for_template(messages),
        "tools": tools,
        "chat_template_kwargs": template_kwargs,
        "cache_salt": salt or "",
    }


def for_template(messages: list[Message]) -> list[dict[str, Any]]:
    """Text parts are joined, fields that are null left out; a developer speaks as the system. Errors: RequestError."""
    return [_for_template(message, f"messages[{position}]") for position, message in enumerate(messages)]


def _for_template(message: Message, path: str) -> dict[str, Any]:
    if message.content is None and not message.tool_calls:
        raise RequestError.invalid(f"{path} says nothing: give it content", f"{path}.content")
    if message.role == "tool" and message.tool_call_id is None:
        raise RequestError.invalid(f"{path}: say which call it answers, in tool_call_id", f"{path}.tool_call_id")
    role = "system" if message.role == "developer" else message.role
    shown: dict[str, Any] = {"role": role, "content": _text(message.content or "", path)}
    if message.tool_calls:
        shown["tool_calls"] = [
            {"id": call.id, "type": call.type, "function": msgspec.structs.asdict(call.function)} for call in message.tool_calls
        ]
    extra = {
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.reasoning_content,
    }
    return shown | {name: value for name, value in extra.items() if value is not None}


def _text(content: str | list[ContentPart], path: str) -> str:
    if isinstance(content, str):
        return content
    for position, part in enumerate(content):
        if part.type != "text" or part.text is None:
            where = f"{path}.content[{position}]"
            raise RequestError.invalid(f"{where} is of type {part.type[:80]!r}: models served here read text parts only", where)
    return "".join(part.text or "" for part in content)

"""From OpenAI's messages to what a chat template reads. Imports the schemas; no HTTP."""

from typing import Any

from deploy.doors.openai.schemas import ContentPart, Message, ToolCall
from deploy.frontend.errors import RequestError
from deploy.text.sources import arguments_shown


def for_template(messages: list[Message]) -> list[dict[str, Any]]:
    """Text parts are joined, fields that are null left out; a developer speaks as the system. Errors: RequestError."""
    return [_for_template(message, f"messages[{position}]") for position, message in enumerate(messages)]


def _for_template(message: Message, path: str) -> dict[str, Any]:
    if message.content is None and not message.tool_calls:
        raise RequestError.invalid(f"{path} says nothing: give it content", f"{path}.content")
    if message.role == "tool" and message.tool_call_id is None:
        raise RequestError.invalid(f"{path}: say which call it answers, in tool_call_id", f"{path}.tool_call_id")
    shown = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _text(message.content or "", path),
        "tool_calls": [_call(call) for call in message.tool_calls or ()] or None,
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.reasoning_content,
    }
    return {name: value for name, value in shown.items() if value is not None}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": arguments_shown(call.function.arguments)}
    return {"id": call.id, "type": call.type, "function": function}


def _text(content: str | list[ContentPart], path: str) -> str:
    if isinstance(content, str):
        return content
    for position, part in enumerate(content):
        if part.type != "text" or part.text is None:
            where = f"{path}.content[{position}]"
            raise RequestError.invalid(f"{where} is of type {part.type[:80]!r}: models served here read text parts only", where)
    return "".join(part.text or "" for part in content)

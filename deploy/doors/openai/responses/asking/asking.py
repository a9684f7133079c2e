"""From a request of `/v1/responses` to the chat request that asks the same, and back to its own names in what goes wrong.

Imports the schemas of both; no HTTP.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deploy.doors.openai.requests.schemas import ChatRequest, SampledRequest
from deploy.doors.openai.requests.unknown import shortened
from deploy.doors.openai.responses.asking.conversing import messages_of
from deploy.doors.openai.responses.asking.schemas import Item, ResponseRequest
from deploy.frontend.errors import RequestError

LOGPROBS = "message.output_text.logprobs"
INCLUDED = frozenset(
    {
        LOGPROBS,
        "reasoning.encrypted_content",
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)
"""What may be asked for. Of all but log-probabilities there is nothing here: thoughts are told in clear, and tools are the
client's."""

OWN_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_CHAT_NAME = re.compile(rf"\b({'|'.join(map(re.escape, OWN_NAMES))})\b|(?<=\])\.function\b")

FUNCTION_FIELDS = ("name", "description", "parameters", "strict")


def items_of(request: ResponseRequest) -> list[Item]:
    """Of the request's own input. Errors: RequestError."""
    if isinstance(request.input, str):
        return [Item(type="message", role="user", content=request.input)]
    if not request.input and request.previous_response_id is None:
        raise RequestError.invalid("input says nothing: give text, or at least one item", "input")
    return request.input or []


def chat_request(request: ResponseRequest, before: Iterable[Item], items: Iterable[Item]) -> ChatRequest:
    """before: the conversation so far; items: what the request adds. Errors: RequestError."""
    logprobs = LOGPROBS in included(request)
    if request.top_logprobs and not logprobs:
        raise RequestError.invalid(f"top_logprobs goes with {LOGPROBS!r} in include: add it", "top_logprobs")
    if request.truncation == "auto":
        raise RequestError.invalid(
            "truncation=auto is not supported: nothing of a conversation is left out here. Send a shorter input", "truncation"
        )
    shared = {name: getattr(request, name) for name in SampledRequest.__struct_fields__}
    tools, choice = _tools(request.tools or (), request.tool_choice)
    return ChatRequest(
        **shared,
        messages=messages_of(request.instructions, before, items),
        max_completion_tokens=request.max_output_tokens,
        logprobs=logprobs or None,
        top_logprobs=request.top_logprobs if logprobs else None,
        response_format=_format(request.text.format if request.text is not None else None),
        tools=tools or None,
        tool_choice=choice,
        parallel_tool_calls=request.parallel_tool_calls,
        chat_template_kwargs=request.chat_template_kwargs,
        reasoning_effort=request.reasoning.effort if request.reasoning is not None else None,
    )


def included(request: ResponseRequest) -> Sequence[str]:
    """Errors: RequestError."""
    for position, name in enumerate(request.include or ()):
        if name not in INCLUDED:
            said = f"include: {shortened(name)!r} is nothing that can be: leave it out"
            raise RequestError.invalid(said, f"include[{position}]")
    return request.include or ()


def called_here(error: RequestError) -> RequestError:
    """The same error with the names that the fields have in this door."""
    param = None if error.param is None else said_here(error.param)
    return RequestError(
        error.fault, said_here(error.message), param=param, code=error.code, retry_after_s=error.retry_after_s
    )


def said_here(text: str) -> str:
    return _CHAT_NAME.sub(lambda found: OWN_NAMES.get(found[0], ""), text)


def _format(asked: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A schema stands beside its type here, and below it there."""
    if asked is None or asked.get("type") != "json_schema":
        return None if asked is None else dict(asked)
    return {"type": "json_schema", "json_schema": {name: value for name, value in asked.items() if name != "type"}}


def _tools(
    tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any] | None
) -> tuple[list[dict[str, Any]], str | dict[str, Any] | None]:
    """Functions and the choice among them, as chat has them. Errors: RequestError."""
    functions = [_function(tool, f"tools[{position}]") for position, tool in enumerate(tools)]
    match choice:
        case None | "none" | "auto" | "required":
            return functions, choice
        case {"type": "function", "name": str(name)}:
            return functions, {"type": "function", "function": {"name": name}}
        case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": list(allowed)}:
            names = {_allowed(tool, f"tool_choice.tools[{position}]") for position, tool in enumerate(allowed)}
            return [each for each in functions if each["function"].get("name") in names], mode
        case {"type": str(kind)} if kind not in ("function", "allowed_tools"):
            raise _hosted(kind, "tool_choice")
    raise RequestError.invalid(
        'tool_choice must be none, auto, required, {"type": "function", "name": ...} or {"type": "allowed_tools", "mode": ..., '
        '"tools": [...]}',
        "tool_choice",
    )


def _function(tool: Mapping[str, Any], path: str) -> dict[str, Any]:
    match tool:
        case {"type": "function", "name": str()}:
            given = {name: tool[name] for name in tool if name in FUNCTION_FIELDS and tool[name] is not None}
            return {"type": "function", "function": given}
        case {"type": str(kind)} if kind != "function":
            raise _hosted(kind, f"{path}.type")
    raise RequestError.invalid(f'{path} is no tool: write {{"type": "function", "name": ..., "parameters": ...}}', path)


def _allowed(tool: Any, path: str) -> str:
    match tool:
        case {"type": "function", "name": str(name)}:
            return name
    raise RequestError.invalid(f'{path} is no function: write {{"type": "function", "name": ...}}', path)


def _hosted(kind: str, param: str) -> RequestError:
    return RequestError.invalid(
        f"{param}: tools of type {shortened(kind)!r} are not run here: give functions, and run them yourself", param
    )

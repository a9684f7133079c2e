"""From a request for a message to a chat request, once and for all that follows: nothing behind knows which door it came by.

    MessagesRequest, CountTokensRequest ──as_chat──▶ ChatRequest           chat's RequestError ──in_own_words──▶ Anthropic's

Pure functions over records; no HTTP.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from deploy.doors.anthropic.schemas import (
    ContentBlock,
    MessageParam,
    MessagesRequest,
    OutputConfig,
    PromptRequest,
    ThinkingConfig,
    ToolChoice,
    ToolParam,
)
from deploy.doors.anthropic.signatures import is_changed
from deploy.doors.openai.requests.schemas import ChatRequest
from deploy.doors.openai.requests.unknown import shortened
from deploy.doors.warnings import Warnings
from deploy.frontend.errors import RequestError
from deploy.text.content import FunctionCall, Message, PromptError, ToolCall, part_text

ERROR_MARK = "Error: "
"""Before the result of a call that failed: chat templates have no other way to say so."""

BUDGET_UNENFORCED = (
    "thinking.budget_tokens: not enforced: a template that reads thinking_budget shows it to the model; thought and answer "
    "together are bounded by max_tokens"
)

_ELSEWHERE = (
    (re.compile(r"\bresponse_format\.json_schema\b"), "output_config.format"),
    (re.compile(r"\bresponse_format\b"), "output_config.format"),
    (re.compile(r"\.function\.parameters\b"), ".input_schema"),
    (re.compile(r"\.function\.name\b"), ".name"),
    (re.compile(r"^stop\b"), "stop_sequences"),
)
"""What chat calls its fields, and Messages."""


def as_chat(request: PromptRequest, warnings: Warnings) -> ChatRequest:
    """The same question in chat's words; `max_tokens` is left to the caller. warnings: are told what cannot be enforced.
    Errors: RequestError INVALID with the path of the field."""
    for name, reason in request.REFUSED.items():
        if getattr(request, name):
            raise RequestError.invalid(f"{name} is not supported: {reason}", name)
    config = request.output_config or OutputConfig()
    if request.thinking is not None and request.thinking.budget_tokens is not None:
        warnings.add(BUDGET_UNENFORCED)
    return ChatRequest(
        model=request.model,
        messages=_messages(request),
        tools=[_tool(tool, f"tools[{position}]") for position, tool in enumerate(request.tools or ())] or None,
        tool_choice=_tool_choice(request.tool_choice),
        parallel_tool_calls=False if request.tool_choice and request.tool_choice.disable_parallel_tool_use else None,
        chat_template_kwargs=_template_kwargs(request.thinking),
        reasoning_effort=config.effort,
        response_format=None
        if config.format is None
        else {"type": "json_schema", "json_schema": {"name": "output", "schema": config.format.schema}},
        **(_sampling(request) if isinstance(request, MessagesRequest) else {}),
    )


def marks_cache(request: PromptRequest) -> bool:
    """Whether the client asks for anything to be kept. It is kept in any case."""
    system = request.system if isinstance(request.system, list) else ()
    blocks = [*system, *(block for message in request.messages for block in _all_blocks(message.content))]
    return any(marked.cache_control is not None for marked in (request, *blocks, *(request.tools or ())))


def in_own_words(error: RequestError) -> RequestError:
    """A refusal of chat's, with the field's name here."""
    message, param = error.message, error.param
    for chats, own in _ELSEWHERE:
        message, param = chats.sub(own, message), None if param is None else chats.sub(own, param)
    return RequestError(error.fault, message, param=param, code=error.code, retry_after_s=error.retry_after_s)


def _sampling(request: MessagesRequest) -> dict[str, Any]:
    return {
        "stop": request.stop_sequences,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stream": request.stream,
        "user": request.metadata.user_id if request.metadata is not None else None,
    }


def _messages(request: PromptRequest) -> list[Message]:
    """Errors: RequestError."""
    last = len(request.messages) - 1
    if request.messages[last].role == "assistant":
        raise RequestError.invalid(
            f"messages[{last}] is the assistant's, and answers are not continued here: end with a message of the user's",
            f"messages[{last}]",
        )
    told = [] if request.system is None else [Message(role="system", content=_text(request.system, "system"))]
    for position, message in enumerate(request.messages):
        told += _message(message, f"messages[{position}].content")
    return told


def _message(message: MessageParam, path: str) -> Iterator[Message]:
    """Results of calls are messages of their own. Errors: RequestError."""
    if isinstance(message.content, str) or message.role == "system":
        yield Message(role=message.role, content=_text(message.content, path))
    elif message.role == "assistant":
        yield _assistant(message.content, path)
    else:
        yield from _user(message.content, path)


def _user(blocks: Sequence[ContentBlock], path: str) -> Iterator[Message]:
    """In the order of the blocks; text between results is one message. Errors: RequestError."""
    said: list[str] = []
    for position, block in enumerate(blocks):
        where = f"{path}[{position}]"
        if block.type != "tool_result":
            said.append(_text([block], path, position))
            continue
        if said:
            yield Message(role="user", content="".join(said))
            said = []
        if block.tool_use_id is None:
            raise RequestError.invalid(f"{where}: say which call it answers, in tool_use_id", f"{where}.tool_use_id")
        result = _text(block.content or "", f"{where}.content")
        yield Message(role="tool", tool_call_id=block.tool_use_id, content=ERROR_MARK + result if block.is_error else result)
    if said or not blocks:
        yield Message(role="user", content="".join(said))


def _assistant(blocks: Sequence[ContentBlock], path: str) -> Message:
    """Thoughts, text and calls, each put together: a chat template knows no other order. Errors: RequestError."""
    thought, said, calls = "", "", []
    for position, block in enumerate(blocks):
        where = f"{path}[{position}]"
        match block.type:
            case "thinking":
                if is_changed(block.thinking or "", block.signature or ""):
                    raise RequestError.invalid(f"{where} is no longer the thought that was signed: send it as it came", where)
                thought += block.thinking or ""
            case "redacted_thinking":
                pass  # another server's, which nobody else can read
            case "tool_use":
                calls.append(_call(block, where))
            case _:
                said += _text([block], path, position)
    return Message(role="assistant", content=said, reasoning=thought or None, tool_calls=calls or None)


def _call(block: ContentBlock, where: str) -> ToolCall:
    """Errors: RequestError."""
    if block.id is None or block.name is None or block.input is None:
        raise RequestError.invalid(f"{where}: a tool_use block needs id, name and input", where)
    return ToolCall(id=block.id, function=FunctionCall(name=block.name, arguments=json.dumps(block.input, ensure_ascii=False)))


def _text(content: str | Sequence[ContentBlock], path: str, first: int = 0) -> str:
    """Text blocks, joined as they are. first: position of the first. Errors: RequestError for blocks of any other type."""
    if isinstance(content, str):
        return content
    try:
        return "".join(part_text(block.type, block.text, f"{path}[{at}]") for at, block in enumerate(content, start=first))
    except PromptError as error:
        raise RequestError.of_prompt(error, error.field) from None


def _all_blocks(content: str | list[ContentBlock] | None) -> Iterator[ContentBlock]:
    for block in content if isinstance(content, list) else ():
        yield block
        yield from _all_blocks(block.content)


def _tool(tool: ToolParam, path: str) -> dict[str, Any]:
    """Errors: RequestError."""
    if tool.type not in (None, "custom"):
        raise RequestError.invalid(
            f"{path} is {shortened(tool.type)!r}, a tool that this server does not have: offer functions of your own, each "
            "with a name and an input_schema",
            f"{path}.type",
        )
    if tool.name is None or tool.input_schema is None:
        missing = "name" if tool.name is None else "input_schema"
        raise RequestError.invalid(f"{path}.{missing} is missing", f"{path}.{missing}")
    function = {
        "name": tool.name, "description": tool.description, "parameters": tool.input_schema, "strict": tool.strict or None,
    }  # fmt: skip
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _tool_choice(choice: ToolChoice | None) -> str | dict[str, Any] | None:
    """Errors: RequestError."""
    match choice:
        case None:
            return None
        case ToolChoice(type="any"):
            return "required"
        case ToolChoice(type="tool", name=None):
            raise RequestError.invalid("tool_choice: name the tool that is to be called", "tool_choice.name")
        case ToolChoice(type="tool", name=name):
            return {"type": "function", "function": {"name": name}}
    return choice.type


def _template_kwargs(thinking: ThinkingConfig | None) -> dict[str, Any] | None:
    """Under the names of Qwen and GLM, of DeepSeek and of Seed; a template reads what it knows. Where nothing is said, it does
    what it always does."""
    if thinking is None:
        return None
    thinks = thinking.type != "disabled"
    budget = {"thinking_budget": thinking.budget_tokens} if thinks and thinking.budget_tokens is not None else {}
    return {"enable_thinking": thinks, "thinking": thinks, **budget}

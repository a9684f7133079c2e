"""Items of a conversation, as a chat door's messages. Imports the records of both; no HTTP.

An assistant's thought, what it says and what it calls are items of their own here, and one message there: the one that it was
when the model wrote it, so that the template writes the same tokens again and the cache has them.
"""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from deploy.doors.openai.requests.unknown import shortened
from deploy.doors.openai.responses.asking.schemas import Item, ItemPart
from deploy.frontend.errors import Fault, RequestError
from deploy.text.content import FunctionCall, Message, PromptError, ToolCall, part_text

MESSAGE = "message"
REFUSAL = "refusal"
TEXTS = frozenset({"input_text", "output_text", "text", "reasoning_text", "summary_text", REFUSAL})

T = TypeVar("T")


def type_of(item: Item) -> str:
    """A message need not say that it is one."""
    return item.type or MESSAGE


def messages_of(instructions: str | None, before: Iterable[Item], items: Iterable[Item]) -> list[Message]:
    """before: the conversation so far, whose items are in order. Errors: RequestError with the path in `input`."""
    gathered = _Messages()
    if instructions:
        gathered.messages.append(Message(role="system", content=instructions))
    for item in before:
        gathered.take(item, "previous_response_id")
    for position, item in enumerate(items):
        gathered.take(item, f"input[{position}]")
    gathered.flush()
    return gathered.messages


class _Messages:
    """Those of one conversation. What an assistant does is gathered until somebody else's turn, or its next one."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._thoughts: list[str] = []
        self._content: str | None = None
        self._calls: list[ToolCall] = []
        self._called: set[str] = set()

    def take(self, item: Item, path: str) -> None:
        match type_of(item):
            case "message" if item.role == "assistant":
                self._turn()
                self._content = _said(item.content, f"{path}.content")
            case "message":
                self.flush()
                content = _said(item.content, f"{path}.content")
                self.messages.append(Message(role=_required(item.role, f"{path}.role"), content=content))
            case "reasoning":
                self._turn()
                self._thoughts += _thought(item, path)
            case "function_call":
                self._call(item, path)
            case "function_call_output":
                self._answer(item, path)
            case "item_reference":
                raise RequestError.invalid(
                    f"{path} refers to an item, and items are not found by their ids here: send the item itself, or go on from "
                    "its response by previous_response_id",
                    f"{path}.type",
                )
            case other:
                raise RequestError.invalid(
                    f"{path} is of type {shortened(other)!r}: messages, function_call, function_call_output and reasoning are "
                    "what models served here understand",
                    f"{path}.type",
                )

    def flush(self) -> None:
        """The assistant's turn is over."""
        thought = "\n".join(self._thoughts) or None
        if thought is not None or self._content is not None or self._calls:
            self.messages.append(
                Message(role="assistant", content=self._content, tool_calls=self._calls or None, reasoning_content=thought)
            )
        self._thoughts, self._content, self._calls = [], None, []

    def _turn(self) -> None:
        """What comes next in an assistant's turn begins another message, if this one has had its word."""
        if self._content is not None or self._calls:
            self.flush()

    def _call(self, item: Item, path: str) -> None:
        call_id = _required(item.call_id, f"{path}.call_id")
        function = FunctionCall(name=_required(item.name, f"{path}.name"), arguments=item.arguments or "{}")
        self._calls.append(ToolCall(id=call_id, function=function))
        self._called.add(call_id)

    def _answer(self, item: Item, path: str) -> None:
        call_id = _required(item.call_id, f"{path}.call_id")
        if call_id not in self._called:
            raise RequestError.invalid(
                f"{path} answers the call {shortened(call_id)!r}, which nobody has made before it: send the function_call too, "
                "or the previous_response_id of the response with it",
                f"{path}.call_id",
            )
        self.flush()
        said = _said(item.output, f"{path}.output")
        self.messages.append(Message(role="tool", content=said, tool_call_id=call_id, name=item.name))


def _thought(item: Item, path: str) -> Iterator[str]:
    """The thought itself, or its summary where there is nothing else."""
    for name, parts in (("content", item.content), ("summary", item.summary)):
        if text := _text(parts or "", f"{path}.{name}"):
            yield text
            return


def _said(content: str | list[ItemPart] | None, path: str) -> str:
    """Errors: RequestError."""
    if content is None:
        raise _missing(path)
    return _text(content, path)


def _text(content: str | list[ItemPart], path: str) -> str:
    """Parts joined; what an assistant has refused with is what it said. Errors: RequestError."""
    if isinstance(content, str):
        return content
    try:
        return "".join(
            part_text(part.type, part.refusal if part.type == REFUSAL else part.text, f"{path}[{at}]", TEXTS)
            for at, part in enumerate(content)
        )
    except PromptError as error:
        raise RequestError.of_prompt(error, error.field) from None


def _required(value: T | None, path: str) -> T:
    """Errors: RequestError."""
    if value is None:
        raise _missing(path)
    return value


def _missing(path: str) -> RequestError:
    return RequestError(Fault.INVALID, f"{path} is missing", param=path, code="missing_required_parameter")

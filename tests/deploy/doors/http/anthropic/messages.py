"""Asking `/v1/messages` by the `anthropic` package, for the tests of it."""

from typing import Any

import anthropic
import pytest
from anthropic.types import Message, TextBlock

from tests.deploy.doors.http.conftest import MODEL
from tests.deploy.doors.http.openai.test_chat import HELLO


def ask(client: anthropic.Anthropic, messages: Any = HELLO, **fields: Any) -> Message:
    """Greedy, unless the fields say otherwise."""
    answer = client.messages.create(**_as_taken(asked(messages, **fields)))
    assert isinstance(answer, Message)
    return answer


def asked(messages: Any = HELLO, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0} | fields


def _as_taken(fields: dict[str, Any]) -> dict[str, Any]:
    """The package has no arguments for these any more, and sends them nevertheless."""
    beside = {name: fields.pop(name) for name in ("temperature", "top_p", "top_k") if name in fields}
    return fields | {"extra_body": beside | fields.get("extra_body", {})}


def streamed(client: anthropic.Anthropic, messages: Any = HELLO, **fields: Any) -> Message:
    """The same, put together from a stream by the package."""
    with client.messages.stream(**_as_taken(asked(messages, **fields))) as stream:
        return stream.get_final_message()


def text_of(message: Message) -> str:
    assert all(isinstance(block, TextBlock) for block in message.content)
    return "".join(block.text for block in message.content if isinstance(block, TextBlock))


def said(message: Message) -> dict[str, Any]:
    """All of it but for the ids, and for fields that only some of the package's classes have."""
    shown = message.model_dump(exclude_none=True, exclude={"id": True, "content": {"__all__": {"id"}}})
    assert isinstance(shown, dict)
    return shown


def prompt_tokens(message: Message) -> int:
    """All of them, wherever they came from."""
    usage = message.usage
    return usage.input_tokens + (usage.cache_creation_input_tokens or 0) + (usage.cache_read_input_tokens or 0)


def refused(client: anthropic.Anthropic, messages: Any = HELLO, **fields: Any) -> str:
    """The words of the refusal, which is a 400."""
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(client, messages, **fields)
    assert caught.value.type == "invalid_request_error"
    return caught.value.message

"""Anthropic's own package: Messages, as its users begin."""

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.clients.conftest import FullEndpoint
from tests.clients.samples import ASKED, CITIES, MAX_TOKENS, MODEL, PATIENCE_S, WEATHER

TOOL: dict[str, Any] = {"name": "get_weather", "description": "The weather of a city.", "input_schema": WEATHER}
FORCED = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}


@pytest.fixture
def client(address: str) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=address, api_key="none", timeout=PATIENCE_S, max_retries=0) as opened:
        yield opened


def test_messages(client: Any) -> None:
    greedy = {"temperature": 0}  # the package has no argument for it any more
    whole = client.messages.create(model=MODEL, messages=ASKED, max_tokens=16, extra_body=greedy)
    assert (whole.role, whole.content[0].type, whole.stop_reason) == ("assistant", "text", "max_tokens")
    assert whole.usage.output_tokens == 16
    with client.messages.stream(model=MODEL, messages=ASKED, max_tokens=16, extra_body=greedy) as stream:
        deltas = [*stream.text_stream]
        end = stream.get_final_message()
    assert "".join(deltas) == end.content[0].text == whole.content[0].text
    assert end.usage.output_tokens == 16
    counted = client.messages.count_tokens(model=MODEL, messages=ASKED).input_tokens
    asked = whole.usage
    assert counted == asked.input_tokens + (asked.cache_read_input_tokens or 0) + (asked.cache_creation_input_tokens or 0)


def test_a_tool_is_called_and_answers(client: Any) -> None:
    with client.messages.stream(
        model=MODEL, messages=ASKED, tools=[TOOL], tool_choice=FORCED, max_tokens=MAX_TOKENS
    ) as stream:
        parts = [event.partial_json for event in stream if event.type == "input_json"]
        message = stream.get_final_message()
    (call,) = (block for block in message.content if block.type == "tool_use")
    assert len(parts) > 1
    assert (call.name, message.stop_reason) == ("get_weather", "tool_use")
    assert call.input["city"] in CITIES
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}]}
    said = [*ASKED, {"role": "assistant", "content": message.content}, result]
    assert client.messages.create(model=MODEL, messages=said, tools=[TOOL], max_tokens=8).role == "assistant"


def test_thinking(client: Any) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    answer = client.messages.create(model=MODEL, messages=ASKED, max_tokens=1040, thinking=thinking)
    assert answer.content[0].type == "thinking"
    assert answer.content[0].thinking
    said = [*ASKED, {"role": "assistant", "content": answer.content}, *ASKED]
    assert client.messages.create(model=MODEL, messages=said, max_tokens=8).role == "assistant"


def test_errors(client: Any) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="claude", messages=ASKED, max_tokens=8)
    with pytest.raises(anthropic.BadRequestError) as wrong:
        client.messages.create(model=MODEL, messages=[], max_tokens=8)
    body: Any = wrong.value.body
    assert body["error"]["type"] == "invalid_request_error"


def test_a_full_queue_is_waited_for(full: FullEndpoint) -> None:
    client: Any = anthropic.Anthropic(base_url=full.address, api_key="none", timeout=PATIENCE_S, max_retries=5)
    with client, full.until_refused():
        answer = client.messages.create(model=MODEL, messages=ASKED, max_tokens=1)
    assert answer.stop_reason == "max_tokens"


def test_asynchronously(address: str) -> None:
    async def scenario() -> None:
        client: Any = anthropic.AsyncAnthropic(base_url=address, api_key="none", timeout=PATIENCE_S)
        async with client, client.messages.stream(model=MODEL, messages=ASKED, max_tokens=4) as stream:
            text = "".join([part async for part in stream.text_stream])
            assert (await stream.get_final_message()).content[0].text == text

    asyncio.run(scenario())

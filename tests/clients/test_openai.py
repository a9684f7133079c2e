"""OpenAI's own package: completions, chat, Responses and embeddings, as its users begin."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.clients.conftest import FullEndpoint
from tests.clients.samples import ASKED, CHOICE, CITIES, HELLO, MAX_TOKENS, MODEL, PATIENCE_S, THINKING, THOUGHT, TOOL, City


@pytest.fixture
def client(base_url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=base_url, api_key="none", timeout=PATIENCE_S, max_retries=0) as opened:
        yield opened


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_completions(client: Any) -> None:
    whole = client.completions.create(model=MODEL, prompt="def add(", max_tokens=16, temperature=0)
    assert whole.usage.completion_tokens == 16
    parts = [*client.completions.create(model=MODEL, prompt="def add(", max_tokens=16, temperature=0, stream=True)]
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert len(parts) > 1


def test_chat(client: Any) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=16, temperature=0)
    *parts, end = client.chat.completions.create(
        model=MODEL, messages=ASKED, max_tokens=16, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    assert not end.choices
    assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (whole.usage.prompt_tokens, 16)


def test_a_tool_is_called_and_answers(client: Any) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=ASKED, tools=[TOOL], tool_choice=CHOICE, parallel_tool_calls=False, max_tokens=MAX_TOKENS
    ) as stream:
        events = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        message = stream.get_final_completion().choices[0].message
    (call,) = message.tool_calls or []
    assert "".join(event.arguments_delta for event in events) == call.function.arguments
    assert json.loads(call.function.arguments)["city"] in CITIES
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    after = client.chat.completions.create(model=MODEL, messages=[*ASKED, message, result], tools=[TOOL], max_tokens=8)
    assert after.choices[0].message.role == "assistant"


def test_a_function_of_pydantics(client: Any) -> None:
    tool = openai.pydantic_function_tool(City)
    answer = client.chat.completions.parse(
        model=MODEL, messages=ASKED, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=MAX_TOKENS
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, City)


def test_structured_output(client: Any) -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=ASKED, response_format=City, max_tokens=MAX_TOKENS)
    assert isinstance(answer.choices[0].message.parsed, City)


def test_thoughts(client: Any, bias: dict[str, float]) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=24, logit_bias=bias, extra_body=THINKING)
    message = answer.choices[0].message
    assert message.reasoning_content == THOUGHT
    assert message.content
    assert answer.usage.completion_tokens_details.reasoning_tokens


def test_errors(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-5", messages=ASKED)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="a", max_tokens=1 << 20)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "max_tokens")
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=ASKED, response_format=City, max_tokens=1)


def test_a_full_queue_is_waited_for(full: FullEndpoint) -> None:
    client: Any = openai.OpenAI(base_url=full.base_url, api_key="none", timeout=PATIENCE_S, max_retries=5)
    with client, full.until_refused():
        answer = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=1)
    assert answer.choices[0].finish_reason == "length"


def test_asynchronously(base_url: str) -> None:
    async def scenario() -> None:
        client: Any = openai.AsyncOpenAI(base_url=base_url, api_key="none", timeout=PATIENCE_S)
        async with client:
            asked = [client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=4) for _ in range(4)]
            answers = await asyncio.gather(*asked)
            assert len({answer.id for answer in answers}) == 4
            stream = await client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=4, stream=True)
            assert [part async for part in stream][-1].choices[0].finish_reason == "length"

    asyncio.run(scenario())


def test_responses(client: Any) -> None:
    whole = client.responses.create(model=MODEL, input=HELLO, max_output_tokens=16, temperature=0)
    assert whole.output_text
    assert whole.usage.output_tokens == 16
    with client.responses.stream(model=MODEL, input=HELLO, max_output_tokens=16, temperature=0) as stream:
        *events, end = stream
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert (end.type, end.response.status) == ("response.incomplete", whole.status)
    assert "".join(deltas) == end.response.output_text == whole.output_text
    after = client.responses.create(model=MODEL, input="Again.", previous_response_id=whole.id, max_output_tokens=4)
    assert after.previous_response_id == whole.id
    assert after.usage.input_tokens > whole.usage.input_tokens


def test_responses_that_call_and_parse(client: Any) -> None:
    tool = {"type": "function", "strict": True} | TOOL["function"]
    called = client.responses.create(
        model=MODEL, input=HELLO, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_output_tokens=MAX_TOKENS
    )
    (call,) = (item for item in called.output if item.type == "function_call")
    assert json.loads(call.arguments)["city"] in CITIES
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    asked = {"input": [result], "previous_response_id": called.id, "tools": [tool], "max_output_tokens": 8}
    after = client.responses.create(model=MODEL, **asked)
    assert after.status in ("completed", "incomplete")
    parsed = client.responses.parse(model=MODEL, input=HELLO, text_format=City, max_output_tokens=MAX_TOKENS)
    assert isinstance(parsed.output_parsed, City)


def test_embeddings(client: Any) -> None:
    both = client.embeddings.create(model=MODEL, input=["def add(", "import os"])  # the package asks for base64 by itself
    plain = client.embeddings.create(model=MODEL, input="def add(", encoding_format="float")
    assert len(both.data) == 2
    assert both.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-4)
    assert both.data[0].embedding != both.data[1].embedding
    assert both.usage.prompt_tokens > plain.usage.prompt_tokens

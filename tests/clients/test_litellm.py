"""litellm, which speaks to this endpoint as to vLLM's (`hosted_vllm/`) or to any of OpenAI's kind (`openai/`)."""

import asyncio
import json
from typing import Any

import litellm
import pytest

from tests.clients.conftest import FullEndpoint
from tests.clients.samples import ASKED, CHOICE, CITIES, HELLO, MAX_TOKENS, MODEL, PATIENCE_S, THINKING, THOUGHT, TOOL, City

PROVIDERS = ("openai", "hosted_vllm")


def given(base_url: str, provider: str = "openai", **fields: Any) -> dict[str, Any]:
    where = {"model": f"{provider}/{MODEL}", "api_base": base_url, "api_key": "none", "timeout": PATIENCE_S, "num_retries": 0}
    return where | {"messages": ASKED, "max_tokens": 16, "temperature": 0} | fields


@pytest.mark.parametrize("provider", PROVIDERS)
def test_chat(base_url: str, provider: str) -> None:
    whole = litellm.completion(**given(base_url, provider))
    assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (16, "length")
    chunks = [*litellm.completion(**given(base_url, provider), stream=True, stream_options={"include_usage": True})]
    built = litellm.stream_chunk_builder(chunks)
    assert built.choices[0].message.content == whole.choices[0].message.content
    assert built.usage.completion_tokens == 16


def test_a_tool_is_called_and_answers(base_url: str) -> None:
    """As `hosted_vllm` it would take `additionalProperties` from the schema, and arguments that nothing ends are no test."""
    fields: Any = {"tools": [TOOL], "tool_choice": CHOICE, "parallel_tool_calls": False, "max_tokens": MAX_TOKENS}
    message = litellm.completion(**given(base_url, **fields)).choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments)["city"] in CITIES
    chunks = [*litellm.completion(**given(base_url, **fields), stream=True)]
    (streamed,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    after = litellm.completion(**given(base_url, messages=[*ASKED, message, result], tools=[TOOL]))
    assert after.choices[0].message.role == "assistant"


def test_structured_output(base_url: str) -> None:
    answer = litellm.completion(**given(base_url, response_format=City, max_tokens=MAX_TOKENS))
    City.model_validate_json(answer.choices[0].message.content)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_thoughts(base_url: str, bias: dict[str, float], provider: str) -> None:
    fields = given(base_url, provider, logit_bias=bias, extra_body=THINKING)
    message = litellm.completion(**fields).choices[0].message
    assert message.reasoning_content == THOUGHT
    assert message.content
    chunks = [*litellm.completion(**fields, stream=True)]
    built = litellm.stream_chunk_builder(chunks).choices[0].message
    assert (built.reasoning_content, built.content) == (THOUGHT, message.content)
    after = litellm.completion(**given(base_url, provider, messages=[*ASKED, message.model_dump(), *ASKED]))  # as it came
    assert after.choices[0].message.role == "assistant"


def test_text(base_url: str) -> None:
    fields = {"model": f"text-completion-openai/{MODEL}", "prompt": "def add(", "max_tokens": 8, "temperature": 0}
    where = {"api_base": base_url, "api_key": "none", "timeout": PATIENCE_S}
    whole = litellm.text_completion(**fields, **where)
    parts = [*litellm.text_completion(**fields, **where, stream=True)]
    assert "".join(part.choices[0].text or "" for part in parts) == whole.choices[0].text


def test_errors(base_url: str) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**given(base_url, messages=[{"role": "user", "content": "a " * 4000}]))
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**given(base_url, top_p=2))
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**given(base_url) | {"model": "openai/gpt-of-nobody"})


def test_a_full_queue_is_waited_for(full: FullEndpoint) -> None:
    with full.until_refused():
        answer = litellm.completion(**given(full.base_url, max_tokens=1, num_retries=5))
    assert answer.choices[0].finish_reason == "length"


def test_asynchronously(base_url: str) -> None:
    async def scenario() -> None:
        whole = await litellm.acompletion(**given(base_url))
        stream = await litellm.acompletion(**given(base_url), stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == whole.choices[0].message.content

    asyncio.run(scenario())


@pytest.mark.parametrize("provider", PROVIDERS)
def test_embeddings(base_url: str, provider: str) -> None:
    answer = litellm.embedding(f"{provider}/{MODEL}", ["def add(", "import os"], api_base=base_url, api_key="none")
    first, second = (each["embedding"] for each in answer.data)
    assert first != second
    assert answer.usage.prompt_tokens > 0


def test_responses(base_url: str) -> None:
    asked = {"model": f"openai/{MODEL}", "input": HELLO, "max_output_tokens": 16, "temperature": 0}
    where = {"api_base": base_url, "api_key": "none", "timeout": PATIENCE_S}
    whole = litellm.responses(**asked, **where)
    events = [*litellm.responses(**asked, **where, stream=True)]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text

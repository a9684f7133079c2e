"""LangChain's `ChatOpenAI` and `OpenAIEmbeddings`."""

import asyncio
from typing import Any

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from tests.clients import samples
from tests.clients.conftest import FullEndpoint
from tests.clients.samples import CITIES, HELLO, MAX_TOKENS, MODEL, PATIENCE_S, THINKING, City

get_weather = tool(samples.get_weather)


def chat(base_url: str, **settings: Any) -> ChatOpenAI:
    given = {"max_tokens": 16, "temperature": 0, "max_retries": 0} | settings
    return ChatOpenAI(model=MODEL, base_url=base_url, api_key="none", timeout=PATIENCE_S, **given)


def test_chat(base_url: str) -> None:
    llm = chat(base_url)
    whole = llm.invoke(HELLO)
    assert whole.usage_metadata["output_tokens"] == 16
    assert whole.response_metadata["finish_reason"] == "length"
    chunks = [*chat(base_url, stream_usage=True).stream(HELLO)]
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 16
    assert [answer.content for answer in llm.batch([HELLO, HELLO])] == [whole.content] * 2


def test_a_tool_is_called_and_answers(base_url: str) -> None:
    llm = chat(base_url, max_tokens=MAX_TOKENS)
    bound = llm.bind_tools([get_weather], tool_choice="get_weather", parallel_tool_calls=False, strict=True)
    answer = bound.invoke(HELLO)
    (call,) = answer.tool_calls
    assert call["args"]["city"] in CITIES
    streamed: Any = None
    for chunk in bound.stream(HELLO):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed.tool_calls[0]["args"] == call["args"]
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    after = llm.bind_tools([get_weather]).invoke([HumanMessage(HELLO), answer, result], max_tokens=8)
    assert after.type == "ai"


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_structured_output(base_url: str, method: str) -> None:
    llm = chat(base_url, max_tokens=MAX_TOKENS).with_structured_output(City, method=method, include_raw=True)
    answer = llm.invoke(HELLO)
    assert isinstance(answer["parsed"], City), answer


def test_thoughts_do_no_harm(base_url: str, bias: dict[str, float]) -> None:
    """It has no place for them itself, and its users know: what it must not do is to show them as the answer."""
    answer = chat(base_url, logit_bias=bias, extra_body=THINKING).invoke(HELLO)
    assert answer.content
    assert "think" not in answer.content
    assert answer.usage_metadata["output_token_details"]["reasoning"] > 0


def test_responses(base_url: str) -> None:
    llm = chat(base_url, use_responses_api=True)
    whole = llm.invoke(HELLO)
    assert whole.text
    assert "".join(chunk.text for chunk in llm.stream(HELLO)) == whole.text


def test_errors(base_url: str) -> None:
    with pytest.raises(ContextOverflowError):
        chat(base_url).invoke("a " * 4000)
    with pytest.raises(openai.BadRequestError):
        chat(base_url, top_p=2).invoke(HELLO)
    with pytest.raises(openai.NotFoundError):
        ChatOpenAI(model="gpt-5", base_url=base_url, api_key="none").invoke(HELLO)


def test_a_full_queue_is_waited_for(full: FullEndpoint) -> None:
    with full.until_refused():
        answer = chat(full.base_url, max_retries=5, max_tokens=1).invoke(HELLO)
    assert answer.response_metadata["finish_reason"] == "length"


def test_asynchronously(base_url: str) -> None:
    async def scenario() -> None:
        llm = chat(base_url)
        whole = await llm.ainvoke(HELLO)
        assert "".join([chunk.content async for chunk in llm.astream(HELLO)]) == whole.content

    asyncio.run(scenario())


def test_embeddings(base_url: str) -> None:
    texts_as_they_are = {"check_embedding_ctx_length": False}  # it would else send the tokens of another model
    embeddings = OpenAIEmbeddings(model=MODEL, base_url=base_url, api_key="none", **texts_as_they_are)
    first, second = embeddings.embed_documents(["def add(", "import os"])
    assert embeddings.embed_query("def add(") == pytest.approx(first, abs=1e-4)
    assert first != second

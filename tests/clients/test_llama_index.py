"""LlamaIndex's `OpenAILike`, an agent that calls functions, and embeddings."""

import asyncio
from typing import Any

import openai
import pytest
from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

from tests.clients.conftest import FullEndpoint
from tests.clients.samples import HELLO, MAX_TOKENS, MODEL, PATIENCE_S, City, get_weather

ASKED = [ChatMessage(HELLO)]
TOOL = FunctionTool.from_defaults(get_weather)


def llm(base_url: str, **settings: Any) -> OpenAILike:
    given = {"max_tokens": 16, "temperature": 0.0, "is_chat_model": True, "is_function_calling_model": True, "max_retries": 0}
    return OpenAILike(**{"model": MODEL} | given | settings, api_base=base_url, api_key="none", timeout=PATIENCE_S)


def test_chat(base_url: str) -> None:
    whole = llm(base_url).chat(ASKED)
    assert whole.message.content
    assert whole.raw.usage.completion_tokens == 16
    deltas = [part.delta or "" for part in llm(base_url).stream_chat(ASKED)]
    assert len(deltas) > 1
    assert "".join(deltas) == whole.message.content


def test_text(base_url: str) -> None:
    model = llm(base_url, is_chat_model=False)
    whole = model.complete("def add(").text
    assert whole
    assert "".join(part.delta or "" for part in model.stream_complete("def add(")) == whole


def test_a_tool_is_called(base_url: str) -> None:
    model = llm(base_url, max_tokens=MAX_TOKENS, strict=True)
    answer = model.predict_and_call([TOOL], HELLO, tool_required=True, allow_parallel_tool_calls=False)
    assert str(answer).startswith("It is sunny in ")


def test_an_agent_that_calls_functions(base_url: str) -> None:
    async def scenario() -> None:
        agent = FunctionAgent(
            tools=[TOOL], llm=llm(base_url, max_tokens=MAX_TOKENS, strict=True), initial_tool_choice="get_weather",
            allow_parallel_tool_calls=False,
        )  # fmt: skip
        running = agent.run(HELLO)
        events = [event async for event in running.stream_events()]
        (result,) = (event for event in events if isinstance(event, ToolCallResult))
        assert "sunny" in str(result.tool_output)
        assert (await running).response.role == "assistant"

    asyncio.run(scenario())


def test_structured_output(base_url: str) -> None:
    model = llm(base_url, max_tokens=MAX_TOKENS, should_use_structured_outputs=True)
    assert isinstance(model.as_structured_llm(City).complete(HELLO).raw, City)
    called = llm(base_url, max_tokens=MAX_TOKENS, should_use_structured_outputs=False)
    assert isinstance(called.as_structured_llm(City).complete(HELLO).raw, City)


def test_errors(base_url: str) -> None:
    with pytest.raises(openai.NotFoundError):
        llm(base_url, model="gpt-5").chat(ASKED)
    with pytest.raises(openai.BadRequestError):
        llm(base_url).complete("a " * 4000)


def test_a_full_queue_is_waited_for(full: FullEndpoint) -> None:
    with full.until_refused():
        assert llm(full.base_url, max_retries=5).chat(ASKED).message.content


def test_asynchronously(base_url: str) -> None:
    async def scenario() -> None:
        whole = (await llm(base_url).achat(ASKED)).message.content
        stream = await llm(base_url).astream_chat(ASKED)
        assert "".join([part.delta or "" async for part in stream]) == whole

    asyncio.run(scenario())


def test_embeddings(base_url: str) -> None:
    embedding = OpenAILikeEmbedding(MODEL, api_base=base_url, api_key="none")
    first, second = embedding.get_text_embedding_batch(["def add(", "import os"])
    assert embedding.get_query_embedding("def add(") == pytest.approx(first, abs=1e-4)
    assert first != second

"""pydantic-ai: agents with tools and typed outputs, on its models for both of OpenAI's APIs."""

import asyncio
from typing import Any

import pytest
from openai import AsyncOpenAI
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, RunContext, Tool, ToolDefinition
from pydantic_ai.embeddings import Embedder
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.messages import ThinkingPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients import samples
from tests.clients.conftest import FullEndpoint
from tests.clients.samples import HELLO, MAX_TOKENS, MODEL, PATIENCE_S, THINKING, THOUGHT, City

SETTINGS: Any = {"max_tokens": 16, "temperature": 0.0, "timeout": PATIENCE_S}
BOUND: Any = SETTINGS | {"max_tokens": MAX_TOKENS, "parallel_tool_calls": False}


def chat_model(base_url: str, name: str = MODEL) -> OpenAIChatModel:
    return OpenAIChatModel(name, provider=OpenAIProvider(base_url=base_url, api_key="none"))


async def once(context: RunContext[None], tool: ToolDefinition) -> ToolDefinition | None:
    """A model that knows nothing would call it for ever: after it the output's own tool is all that there is."""
    return None if len(context.messages) > 1 else tool


def test_text(base_url: str) -> None:
    agent = Agent(chat_model(base_url), model_settings=SETTINGS, instructions="Be brief.")
    first = agent.run_sync(HELLO)
    assert first.output
    assert first.usage.output_tokens == 16
    second = agent.run_sync("Again.", message_history=first.all_messages())
    assert second.usage.input_tokens > first.usage.input_tokens


def test_a_tool_and_an_output_type(base_url: str) -> None:
    """The tool is called, its answer goes back, and the record comes last."""
    cities = []

    def get_weather(city: str) -> str:
        """The weather of a city."""
        cities.append(city)
        return samples.get_weather("Paris")

    get_weather.__annotations__ |= samples.get_weather.__annotations__
    tool = Tool(get_weather, prepare=once)

    def first_the_tool(context: RunContext[None]) -> Any:
        return BOUND | ({"tool_choice": ["get_weather"]} if context.run_step == 1 else {})

    agent = Agent(chat_model(base_url), output_type=City, tools=[tool], model_settings=first_the_tool)
    answer = agent.run_sync(HELLO)
    assert isinstance(answer.output, City)
    assert len(cities) == 1
    assert answer.usage.tool_calls == 1


def test_a_native_output_type(base_url: str) -> None:
    agent = Agent(chat_model(base_url), output_type=NativeOutput(City), model_settings=BOUND)
    assert isinstance(agent.run_sync(HELLO).output, City)


def test_a_stream(base_url: str) -> None:
    async def scenario() -> None:
        agent = Agent(chat_model(base_url), model_settings=SETTINGS)
        whole = (await agent.run(HELLO)).output
        async with agent.run_stream(HELLO) as run:
            deltas = [delta async for delta in run.stream_text(delta=True, debounce_by=None)]
        assert "".join(deltas).strip() == whole.strip()
        assert run.usage.output_tokens == 16

    asyncio.run(scenario())


def test_thoughts(base_url: str, bias: dict[str, float]) -> None:
    agent = Agent(chat_model(base_url), model_settings=SETTINGS | {"logit_bias": bias, "extra_body": THINKING})
    answer = agent.run_sync(HELLO)
    parts = answer.response.parts
    assert [part.content for part in parts if isinstance(part, ThinkingPart)] == [THOUGHT]
    assert agent.run_sync("Again.", message_history=answer.all_messages()).output


def test_errors(base_url: str) -> None:
    with pytest.raises(ModelHTTPError) as unknown:
        Agent(chat_model(base_url, "gpt-5"), model_settings=SETTINGS).run_sync(HELLO)
    assert unknown.value.status_code == 404


def test_a_full_queue_is_waited_for(full: FullEndpoint) -> None:
    client = AsyncOpenAI(base_url=full.base_url, api_key="none", max_retries=5)
    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=client))
    with full.until_refused():
        assert Agent(model, model_settings=SETTINGS).run_sync(HELLO).output


def test_embeddings(base_url: str) -> None:
    embedder = Embedder(OpenAIEmbeddingModel(MODEL, provider=OpenAIProvider(base_url=base_url, api_key="none")))
    first, second = embedder.embed_documents_sync(["def add(", "import os"]).embeddings
    assert [*first] != [*second]


def test_responses(base_url: str) -> None:
    model = OpenAIResponsesModel(MODEL, provider=OpenAIProvider(base_url=base_url, api_key="none"))
    assert Agent(model, model_settings=SETTINGS).run_sync(HELLO).output
    assert isinstance(Agent(model, output_type=City, model_settings=BOUND).run_sync(HELLO).output, City)

"""instructor: records instead of text, by tools, by JSON, by a schema."""

import asyncio
import itertools
from typing import Any

import instructor
import openai
import pytest
from instructor.core import InstructorRetryException

from tests.clients.conftest import FullEndpoint
from tests.clients.samples import ASKED, MAX_TOKENS, MODEL, PATIENCE_S, City

MODES = (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA)
GIVEN: dict[str, Any] = {"model": MODEL, "messages": ASKED, "max_tokens": MAX_TOKENS, "max_retries": 1, "temperature": 0}


def patched(base_url: str, mode: instructor.Mode, **settings: Any) -> Any:
    client = openai.OpenAI(base_url=base_url, api_key="none", timeout=PATIENCE_S, **settings)
    return instructor.from_openai(client, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_record(base_url: str, mode: instructor.Mode) -> None:
    city, answer = patched(base_url, mode).chat.completions.create_with_completion(**GIVEN, response_model=City)
    assert isinstance(city, City)
    assert answer.usage.completion_tokens > 0


@pytest.mark.parametrize("mode", MODES)
def test_a_record_as_it_grows(base_url: str, mode: instructor.Mode) -> None:
    parts = [*patched(base_url, mode).chat.completions.create_partial(**GIVEN, response_model=City)]
    assert len(parts) > 1
    assert City.model_validate(parts[-1].model_dump())


def test_several_records(base_url: str) -> None:
    """As long a list as the model likes, whose last record may be cut: each is there as soon as it is whole."""
    cities = patched(base_url, instructor.Mode.TOOLS).chat.completions.create_iterable(**GIVEN, response_model=City)
    assert all(isinstance(city, City) for city in itertools.islice(cities, 2))


def test_json_without_its_schema(base_url: str) -> None:
    """`Mode.JSON` shows the schema and asks for any object: a model that cannot read gives another one, and is asked anew."""
    client = patched(base_url, instructor.Mode.JSON)
    with pytest.raises(InstructorRetryException) as failed:
        client.chat.completions.create(**GIVEN | {"max_tokens": 32, "max_retries": 2}, response_model=City)
    assert failed.value.n_attempts == 3


def test_errors(base_url: str) -> None:
    with pytest.raises(InstructorRetryException) as failed:
        patched(base_url, instructor.Mode.TOOLS, max_retries=0).chat.completions.create(
            **GIVEN | {"model": "gpt-5"}, response_model=City
        )
    assert "gpt-5" in str(failed.value)


def test_a_full_queue_is_waited_for(full: FullEndpoint) -> None:
    client = patched(full.base_url, instructor.Mode.JSON_SCHEMA, max_retries=5)
    with full.until_refused():
        assert isinstance(client.chat.completions.create(**GIVEN, response_model=City), City)


def test_asynchronously(base_url: str) -> None:
    async def scenario() -> None:
        client = instructor.from_openai(openai.AsyncOpenAI(base_url=base_url, api_key="none", timeout=PATIENCE_S))
        assert isinstance(await client.chat.completions.create(**GIVEN, response_model=City), City)

    asyncio.run(scenario())


def test_responses(base_url: str) -> None:
    client = patched(base_url, instructor.Mode.RESPONSES_TOOLS)
    asked = {"input": ASKED, "response_model": City, "max_output_tokens": MAX_TOKENS}
    assert isinstance(client.responses.create(model=MODEL, **asked), City)

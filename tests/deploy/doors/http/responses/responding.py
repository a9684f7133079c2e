"""What tests of `/v1/responses` share: requests, raw events held against the official types, and models that say something."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from deploy.config.serve import ServeConfig
from deploy.frontend.service.model import ServedModel
from tests.deploy.doors.dialects.conftest import QWEN_TEMPLATE
from tests.deploy.doors.http.conftest import MODEL, PATIENCE_S, Host
from tests.deploy.doors.http.openai.test_reasoning import Thinker
from tests.deploy.doors.http.openai.test_tools import CLOCK, WEATHER

HELLO = "Say hello."
SAID = [{"role": "user", "content": HELLO}]


def flat(tool: dict[str, Any]) -> dict[str, Any]:
    """A function as Responses write it."""
    return {"type": "function", **tool["function"]}


TOOLS = [flat(WEATHER), flat(CLOCK)]
WEATHER_ASKED = {"type": "function", "name": "get_weather"}

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def respond(client: openai.OpenAI, input: object = HELLO, **fields: object) -> Response:
    """Greedy, unless the fields say otherwise."""
    asked = {"model": MODEL, "input": input, "temperature": 0, "max_output_tokens": 8} | fields
    answer = client.responses.create(**asked)  # type: ignore[call-overload]
    assert isinstance(answer, Response)
    return answer


def refused(client: openai.OpenAI, input: object = HELLO, **fields: object) -> openai.BadRequestError:
    with pytest.raises(openai.BadRequestError) as caught:
        respond(client, input, **fields)
    return caught.value


def posted(address: str, **fields: object) -> httpx.Response:
    return httpx.post(f"{address}/v1/responses", json={"input": HELLO, "max_output_tokens": 8} | fields, timeout=PATIENCE_S)


def events_of(address: str, **fields: object) -> list[dict[str, Any]]:
    """Of a stream: each of the official type that it names, under that name, numbered in order, and nothing else in between."""
    body = {"input": HELLO, "temperature": 0, "max_output_tokens": 8, "stream": True} | fields
    with httpx.stream("POST", f"{address}/v1/responses", json=body, timeout=PATIENCE_S) as answer:
        text = "".join(answer.iter_text())
        assert (answer.status_code, answer.headers.get("content-type")) == (200, "text/event-stream; charset=utf-8"), text
    events = []
    for number, block in enumerate(text.removesuffix("\n\n").split("\n\n")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        read = EVENT.validate_python(event)
        assert (read.type, type(read).model_fields["type"].annotation.__args__) == (event["type"], (event["type"],))
        events.append(event)
    return events


def kinds(events: Iterable[dict[str, Any]]) -> list[str]:
    """Types in order, without `response.`, each run of the same once."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for at, name in enumerate(names) if at == 0 or names[at - 1] != name]


def plain(response: dict[str, Any]) -> dict[str, Any]:
    """Without what is new each time."""
    chance = {"id", "call_id", "created_at", "completed_at"}
    output = [{name: value for name, value in item.items() if name not in chance} for item in response["output"]]
    return {name: value for name, value in response.items() if name not in chance} | {"output": output}


class Model(Thinker):
    """With its service, and what it was asked."""

    def asked(self) -> str:
        """Its last prompt."""
        return self.tokenizer.decode(memoryview(self.engine.requests[-1].tokens).cast("i").tolist())


Saying = Callable[..., Model]


def make_saying(host: Host, read: Callable[[str], ServedModel], opened: list[Model]) -> Saying:
    """read: a model with this chat template."""

    def say(output: str, template: str = QWEN_TEMPLATE.replace("<think></think>", "Briefly: "), **config: Any) -> Model:
        steps = config.pop("steps", 1)
        opened.append(Model(host, read(template), output, steps, ServeConfig(**config)))
        return opened[-1]

    return say

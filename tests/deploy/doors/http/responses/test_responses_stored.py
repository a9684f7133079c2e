"""Responses that are kept: gone on from, asked for, listed and deleted by whose they are, whichever front end is asked."""

import httpx
import openai
import pytest
from openai.types.responses import ResponseFunctionToolCallItem, ResponseFunctionToolCallOutputItem

from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.doors.openai.responses.store.storing import Bounds, OwnResponses, StoredTurn
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.service.service import Service
from tests.deploy.doors.http.conftest import MODEL, PATIENCE_S, Host
from tests.deploy.doors.http.openai.test_tools import CLOCK
from tests.deploy.doors.http.responses.responding import (
    HELLO,
    SAID,
    TOOLS,
    WEATHER_ASKED,
    events_of,
    flat,
    posted,
    refused,
    respond,
)

ANN, BOB = "key of ann", "key of bob"


def opened(address: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S)


def test_a_conversation_goes_on_by_id(client: openai.OpenAI) -> None:
    """As if all of it had been sent, to the token."""
    first = respond(client, "Who are you?", instructions="Be brief.", max_output_tokens=60)
    second = respond(client, "And now?", previous_response_id=first.id, max_output_tokens=60)
    third = respond(client, HELLO, previous_response_id=second.id)
    asked = [
        {"role": "user", "content": "Who are you?"}, *first.output, {"role": "user", "content": "And now?"}, *second.output,
        *SAID,
    ]  # fmt: skip
    whole = respond(client, asked)
    assert third.output_text == whole.output_text
    assert third.usage is not None
    assert whole.usage is not None
    assert third.usage.input_tokens == whole.usage.input_tokens, "instructions are not taken along"
    other = respond(client, HELLO, previous_response_id=first.id)
    assert other.usage is not None
    assert other.usage.input_tokens < third.usage.input_tokens, "another may go on from the same"


def test_a_stream_goes_on_and_is_kept(client: openai.OpenAI, address: str) -> None:
    first = events_of(address)[-1]["response"]
    assert first["store"]
    last = events_of(address, input="And now?", previous_response_id=first["id"])[-1]["response"]
    assert last["previous_response_id"] == first["id"]
    assert client.responses.retrieve(last["id"]).to_dict() == last


def test_a_kept_response_is_what_was_told(client: openai.OpenAI) -> None:
    answer = respond(client, metadata={"a": "b"})
    assert client.responses.retrieve(answer.id).to_dict() == answer.to_dict()
    client.responses.delete(answer.id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.retrieve(answer.id)
    assert caught.value.code == "response_not_found"
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(answer.id)
    error = refused(client, previous_response_id=answer.id)
    assert (error.param, error.code) == ("previous_response_id", "previous_response_not_found")


def test_what_goes_on_outlives_what_it_goes_on_from(client: openai.OpenAI) -> None:
    first = respond(client, "Who are you?")
    second = respond(client, HELLO, previous_response_id=first.id)
    client.responses.delete(first.id)
    third = respond(client, HELLO, previous_response_id=second.id)
    assert len(client.responses.input_items.list(third.id).data) == 5


def test_store_false(client: openai.OpenAI) -> None:
    answer = respond(client, store=False)
    assert answer.to_dict()["store"] is False
    assert refused(client, previous_response_id=answer.id).code == "previous_response_not_found"


def test_input_items(client: openai.OpenAI) -> None:
    first = respond(client, tools=TOOLS, tool_choice=WEATHER_ASKED, max_output_tokens=200)
    result = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "sunny"}  # type: ignore[union-attr]
    more = [result, {"role": "assistant", "content": "Sunny."}, {"role": "user", "content": "Thanks."}]
    second = respond(client, more, tools=TOOLS, previous_response_id=first.id)
    listed = client.responses.input_items.list(second.id, order="asc")
    assert [item.type for item in listed.data] == ["message", "function_call", "function_call_output", "message", "message"]
    assert isinstance(listed.data[1], ResponseFunctionToolCallItem)
    assert isinstance(listed.data[2], ResponseFunctionToolCallOutputItem)
    assert listed.data[0].to_dict()["content"] == [{"type": "input_text", "text": HELLO}]
    assert listed.data[3].to_dict()["content"] == [{"type": "output_text", "text": "Sunny.", "annotations": []}]
    assert len({item.id for item in listed.data}) == 5
    pages = client.responses.input_items.list(second.id, limit=2)
    assert (len(pages.data), pages.has_more) == (2, True)
    assert [item.id for item in pages] == [item.id for item in listed.data][::-1], "the newest first, page by page"
    for fields, param in (({"limit": 0}, "limit"), ({"after": "msg_x"}, "after"), ({"order": "up"}, "order")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.input_items.list(second.id, **fields)
        assert caught.value.param == param


def test_cancel_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(respond(client).id)
    with pytest.raises(openai.BadRequestError, match="not streamed"):
        client.responses.retrieve(respond(client).id, stream=True).close()


def test_another_key_finds_nothing(host: Host, service: Service) -> None:
    address = host.serve(service, keys=ApiKeys([ANN, BOB]))
    ann, bob = opened(address, ANN), opened(address, BOB)
    answer = respond(ann)
    for ask in (bob.responses.retrieve, bob.responses.delete, bob.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            ask(answer.id)
    assert refused(bob, previous_response_id=answer.id).code == "previous_response_not_found"
    assert respond(ann, previous_response_id=answer.id).status == "incomplete"
    assert httpx.get(f"{address}/v1/responses/{answer.id}").status_code == 401


def test_any_front_end_finds_them(host: Host, service: Service) -> None:
    store = OwnResponses(Bounds(100, 1 << 20, 3600.0))
    one, other = (opened(host.serve(service, store=store)) for _ in range(2))
    answer = respond(one)
    assert other.responses.retrieve(answer.id).to_dict() == answer.to_dict()
    assert respond(other, previous_response_id=answer.id).previous_response_id == answer.id


def test_there_are_no_more_than_may_be(host: Host, service: Service) -> None:
    client = opened(host.serve(service, ServeConfig(stored_responses=2)))
    first, second, third = (respond(client).id for _ in range(3))
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first)
    assert [client.responses.retrieve(name).id for name in (second, third)] == [second, third]


def test_where_nothing_is_kept(host: Host, service: Service) -> None:
    address = host.serve(service, ServeConfig(stored_responses=0))
    answer = posted(address)
    assert answer.json()["store"] is False
    assert "not kept" in answer.headers["warning"]
    assert "warning" not in posted(address, store=False).headers
    assert events_of(address)[-1]["response"]["store"] is False


class Unreachable:
    """A store that nobody can ask."""

    async def put(self, owner: str, name: str, previous: str | None, body: bytes, turn: StoredTurn) -> bool:  # noqa: ARG002
        return False

    async def body(self, owner: str, name: str) -> bytes | None:  # noqa: ARG002
        raise RequestError(Fault.UNAVAILABLE, "the store does not answer")

    async def turns(self, owner: str, name: str) -> list[StoredTurn] | None:  # noqa: ARG002
        raise RequestError(Fault.UNAVAILABLE, "the store does not answer")

    async def delete(self, owner: str, name: str) -> bool:  # noqa: ARG002
        raise RequestError(Fault.UNAVAILABLE, "the store does not answer")


def test_a_store_that_cannot_be_reached_costs_no_answer(host: Host, service: Service) -> None:
    address = host.serve(service, store=Unreachable())
    answer = posted(address, tools=[flat(CLOCK)])
    assert (answer.status_code, answer.json()["store"]) == (200, False)
    client = opened(address)
    with pytest.raises(openai.InternalServerError) as caught:
        client.responses.create(model=MODEL, input=HELLO, previous_response_id="resp_1")
    assert caught.value.status_code == 503
    with pytest.raises(openai.InternalServerError):
        client.responses.retrieve("resp_1")

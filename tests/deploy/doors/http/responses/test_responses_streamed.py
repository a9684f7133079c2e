"""Streams of `/v1/responses`: events of the official types, in the official order, and together what the whole answer says."""

from typing import Any

import httpx
import openai
import pytest

from scheduler.protocol.messages import Failure
from tests.deploy.doors.dialects.conftest import QWEN_TEMPLATE
from tests.deploy.doors.http.conftest import MODEL, PATIENCE_S, Host, Scripted, until
from tests.deploy.doors.http.openai.test_reasoning import OUTPUT, THOUGHT
from tests.deploy.doors.http.openai.test_tools import SPOKEN
from tests.deploy.doors.http.responses.responding import (
    HELLO,
    TOOLS,
    WEATHER_ASKED,
    Model,
    Saying,
    events_of,
    kinds,
    plain,
    posted,
)  # fmt: skip
from tests.deploy.frontend.fake_engine import FakeEngine

CALL = SPOKEN.removeprefix("Let me see.\n")
BEGIN = ["created", "in_progress"]
MESSAGE = [
    "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done", "output_item.done",
]  # fmt: skip
THINKING = [
    "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done",
    "output_item.done",
]  # fmt: skip
CALLING = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]


def joined(events: list[dict[str, Any]], kind: str, place: int) -> str:
    return "".join(e["delta"] for e in events if e["type"] == f"response.{kind}" and e["output_index"] == place)


def test_text_in_its_events(address: str) -> None:
    events = events_of(address, max_output_tokens=60)
    assert kinds(events) == [*BEGIN, *MESSAGE, "completed"]
    created, last = events[0]["response"], events[-1]["response"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    assert (last["status"], last["id"]) == ("completed", created["id"])
    whole = posted(address, temperature=0, max_output_tokens=60).json()
    assert plain(last) | {"usage": None} == plain(whole) | {"usage": None}
    assert joined(events, "output_text.delta", 0) == whole["output"][0]["content"][0]["text"]
    assert len([event for event in events if event["type"].endswith("text.delta")]) > 3
    ids = {event["item_id"] for event in events if "item_id" in event}
    assert ids == {last["output"][0]["id"]}


def test_a_stream_that_is_cut_off_is_incomplete(address: str) -> None:
    events = events_of(address, max_output_tokens=5)
    assert kinds(events) == [*BEGIN, *MESSAGE, "incomplete"]
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert events[-2]["item"]["status"] == "incomplete"


@pytest.mark.parametrize("steps", [1, 3, 500])
def test_thoughts_text_and_calls(saying: Saying, steps: int) -> None:
    model = saying(f"{OUTPUT}{CALL}\nAnd now?\n{CALL}", QWEN_TEMPLATE, steps=steps)
    asked: dict[str, Any] = {"tools": TOOLS, "max_output_tokens": 500, "store": False}
    events = events_of(model.address, **asked)
    assert kinds(events) == [*BEGIN, *THINKING, *MESSAGE, *CALLING, *MESSAGE, *CALLING, "completed"]
    last = events[-1]["response"]
    assert plain(last) == plain(posted(model.address, temperature=0, **asked).json())
    assert joined(events, "reasoning_text.delta", 0) == THOUGHT
    for place, item in enumerate(last["output"]):
        done = [e["item"] for e in events if e["type"] == "response.output_item.done" and e["output_index"] == place]
        assert done == [item]
        if item["type"] == "message":
            assert joined(events, "output_text.delta", place) == item["content"][0]["text"]
        if item["type"] == "function_call":
            assert joined(events, "function_call_arguments.delta", place) == item["arguments"]


def test_summaries_where_they_are_asked_for(saying: Saying) -> None:
    model = saying(OUTPUT, QWEN_TEMPLATE, steps=500)
    events = events_of(model.address, max_output_tokens=300, reasoning={"summary": "auto"})
    assert kinds(events)[2:12] == [
        "output_item.added", "content_part.added", "reasoning_summary_part.added", "reasoning_text.delta",
        "reasoning_summary_text.delta", "reasoning_text.done", "content_part.done", "reasoning_summary_text.done",
        "reasoning_summary_part.done", "output_item.done",
    ]  # fmt: skip
    assert joined(events, "reasoning_summary_text.delta", 0) == THOUGHT


def test_logprobs_come_with_their_text(address: str) -> None:
    include = ["message.output_text.logprobs"]
    events = events_of(address, include=include, top_logprobs=2)
    told = [entry for e in events if e["type"] == "response.output_text.delta" for entry in e["logprobs"]]
    done = next(e for e in events if e["type"] == "response.output_text.done")
    assert told == done["logprobs"] == events[-1]["response"]["output"][0]["content"][0]["logprobs"]
    assert (len(told), len(told[0]["top_logprobs"])) == (8, 2)


@pytest.mark.parametrize("steps", [1, 4, 500])
def test_tokens_of_calls_are_not_the_texts(saying: Saying, steps: int) -> None:
    model = saying(f"{SPOKEN}\nAnd now?\n{CALL}", steps=steps)
    include = ["message.output_text.logprobs"]
    events = events_of(model.address, include=include, tools=TOOLS, max_output_tokens=300)
    texts = [e for e in events if e["type"] == "response.output_text.done"]
    spelled = [b"".join(bytes(entry["bytes"]) for entry in e["logprobs"]).decode().strip() for e in texts]
    assert [e["text"].strip() for e in texts] == ["Let me see.", "And now?"]
    assert (spelled[0], spelled[1].removeprefix(">").strip()) == ("Let me see.", "And now?")  # `>\n` is a token


def test_the_official_client_puts_it_together(client: openai.OpenAI, saying: Saying) -> None:
    with client.responses.stream(model=MODEL, input=HELLO, temperature=0, max_output_tokens=60) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.output_text == text == client.responses.create(model=MODEL, input=HELLO, temperature=0).output_text
    tools: Any = TOOLS
    choice: Any = WEATHER_ASKED
    with client.responses.stream(
        model=MODEL, input=HELLO, tools=tools, tool_choice=choice, temperature=0, max_output_tokens=200
    ) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.function_call_arguments.delta"]
        (call,) = stream.get_final_response().output
    assert call.type == "function_call"
    assert snapshots[-1] == call.arguments
    model = saying(OUTPUT, QWEN_TEMPLATE)
    with model.client.responses.stream(model=MODEL, input=HELLO, max_output_tokens=300) as stream:
        stream.until_done()
        assert [item.type for item in stream.get_final_response().output] == ["reasoning", "message"]


def test_what_fails_before_the_first_event_has_its_status(scripted: Scripted) -> None:
    engine = FakeEngine([300], failure=Failure.OVERLOADED, retry_after_s=7.0)
    address = scripted(engine)
    tokens = httpx.post(f"{address}/tokenize", json={"messages": [{"role": "user", "content": HELLO}]}).json()["tokens"]
    engine.refuse = {tokens[0]: "the queue is full"}
    answer = posted(address, stream=True)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert posted(address, stream=True, truncation="auto").json()["error"]["param"] == "truncation"


def test_what_fails_later_is_told_in_the_stream(host: Host, saying: Saying) -> None:
    model = saying("Hello, hello, hello.")
    model.engine.hold_after = 3
    body = {"input": HELLO, "stream": True, "max_output_tokens": 20}
    with httpx.stream("POST", f"{model.address}/v1/responses", json=body, timeout=PATIENCE_S) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        first = next(lines)
        assert model.engine.holding.wait(PATIENCE_S)
        host.run(_end_all(model))
        model.engine.released.set()
        rest = [line for line in lines if line.startswith("event: ")]
    assert first == "event: response.created"
    assert rest[-2:] == ["event: error", "event: response.failed"]


async def _end_all(model: Model) -> None:
    model.service.end_all()


def test_a_client_that_goes_away_ends_its_response(saying: Saying) -> None:
    model = saying("Hello, hello, hello.")
    model.engine.hold_after = 3
    body = {"input": HELLO, "stream": True, "max_output_tokens": 20}
    with httpx.stream("POST", f"{model.address}/v1/responses", json=body, timeout=PATIENCE_S) as answer:
        lines = answer.iter_lines()  # which ends the request when it is let go
        assert next(lines) == "event: response.created"
        assert model.engine.holding.wait(PATIENCE_S)
    until(lambda: model.engine.aborted)

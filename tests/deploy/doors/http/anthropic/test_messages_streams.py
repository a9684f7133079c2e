"""Streams of `/v1/messages`: which events come, in which order, and what becomes of one that fails."""

import json
import time
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from deploy.config.load import EMBEDDED_MODEL
from deploy.doors.anthropic.signatures import signature
from deploy.doors.openai.streams import sse
from tests.deploy.doors.dialects.conftest import QWEN_TEMPLATE
from tests.deploy.doors.http.anthropic.messages import ask, asked, said, streamed
from tests.deploy.doors.http.conftest import PATIENCE_S, Scripted, messages_client
from tests.deploy.doors.http.openai.test_chat import HELLO
from tests.deploy.doors.http.openai.test_tools import SPOKEN, saying
from tests.deploy.frontend.fake_engine import CACHED_TOKENS, FakeEngine

CALL = SPOKEN.removeprefix("Let me see.\n")
TOOLS = [{"name": "get_weather", "input_schema": {"type": "object"}}]
THOUGHT, ANSWER = "Is it caf\u00e9 \u4f60\u597d?", "Yes."


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that ships with Manta, with a template of a model that thinks."""
    folder = tmp_path_factory.mktemp("thinker")
    for file in EMBEDDED_MODEL.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE)
    return folder


Event = dict[str, Any]


def events_of(address: str, **fields: Any) -> list[Event]:
    """Each of a stream, in order; its name is its type."""
    events: list[Event] = []
    with httpx.stream("POST", f"{address}/v1/messages", json=asked(stream=True, **fields), timeout=PATIENCE_S) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for block in "".join(answer.iter_text()).removesuffix("\n\n").split("\n\n"):
            name, data = block.split("\n")
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
    return events


def text_in(events: list[Event], kind: str, field: str) -> str:
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    return "".join(delta[field] for delta in deltas if delta["type"] == kind)


@pytest.mark.parametrize("steps", [1, 3, 500])
def test_events_and_their_order(scripted: Scripted, thinker: Path, steps: int) -> None:
    engine = saying(f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}\n{CALL}\n{CALL}")
    engine.steps_per_delta = steps
    events = events_of(scripted(engine, thinker), tools=TOOLS, max_tokens=300)
    begin, ping, *blocks, end, stop = events
    assert (begin["type"], ping, stop) == ("message_start", {"type": "ping"}, {"type": "message_stop"})
    assert (begin["message"]["content"], begin["message"]["stop_reason"]) == ([], None)
    assert begin["message"]["usage"]["input_tokens"] == end["usage"]["input_tokens"] + CACHED_TOKENS
    assert (end["type"], end["delta"]) == ("message_delta", {"stop_reason": "tool_use", "stop_sequence": None})
    kinds = []
    for index in range(4):
        first, *deltas, last = [event for event in blocks if event["index"] == index]
        assert (first["type"], last["type"]) == ("content_block_start", "content_block_stop")
        assert {event["type"] for event in deltas} == {"content_block_delta"}
        kinds.append((first["content_block"]["type"], {event["delta"]["type"] for event in deltas}))
        if index == 0:
            assert deltas[-1]["delta"] == {"type": "signature_delta", "signature": signature(THOUGHT)}
    called = ("tool_use", {"input_json_delta"})
    assert kinds == [("thinking", {"thinking_delta", "signature_delta"}), ("text", {"text_delta"}), called, called]
    assert [event["index"] for event in blocks] == sorted(event["index"] for event in blocks), "one block after the other"
    assert (text_in(blocks, "thinking_delta", "thinking"), text_in(blocks, "text_delta", "text")) == (THOUGHT, ANSWER)


OUTPUTS = [
    f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}\n{CALL}",
    f"{CALL}\nAnd more.",
    f"{ANSWER}{CALL}{CALL}",
    f"<think>{THOUGHT}",
    "",
]


@pytest.mark.few
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("steps", [1, 4])
def test_a_stream_says_the_same(scripted: Scripted, thinker: Path, output: str, steps: int) -> None:
    """Wherever the output is cut."""
    engine = saying(output)
    engine.steps_per_delta = steps
    with messages_client(scripted(engine, thinker)) as client:
        for most in (1, 7, 20, 30, 40, 45, 50, 300):
            whole, told = (said(tell(client, tools=TOOLS, max_tokens=most)) for tell in (ask, streamed))
            assert told == whole


def test_a_stream_that_waits_is_kept_alive(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_S", 0.05)
    engine, pings = FakeEngine([300] * 20, hold_after=5), 0
    body = asked(stream=True, max_tokens=20)
    with httpx.stream("POST", f"{scripted(engine)}/v1/messages", json=body, timeout=PATIENCE_S) as answer:
        for line in answer.iter_lines():
            pings += line == "event: ping"
            if pings > 5:  # the first comes with the message's beginning
                engine.released.set()
        assert pings > 5


@pytest.mark.parametrize("accept", ["*/*", "text/event-stream"])
def test_openais_streams_that_wait_are_kept_alive_for_who_reads_event_streams(
    accept: str, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By comments: others may take every line for data."""
    monkeypatch.setattr(sse, "PING_S", 0.05)
    engine, lines, address = FakeEngine([300] * 20, hold_after=5), [], "/v1/chat/completions"
    body, headers = {"messages": HELLO, "stream": True, "max_tokens": 20}, {"accept": accept}
    with httpx.stream("POST", scripted(engine) + address, json=body, headers=headers, timeout=PATIENCE_S) as answer:
        for line in answer.iter_lines():
            lines.append(line)
            if not engine.released.is_set() and engine.holding.wait(0.01):
                time.sleep(0.5)
                engine.released.set()
    assert "data: [DONE]" in lines
    assert (sse.COMMENT.decode().strip() in lines) == (accept != "*/*")
    assert not any("ping" in line for line in lines)


def test_a_stream_that_fails(scripted: Scripted) -> None:
    address = scripted(FakeEngine([300] * 20, lose_after=5))
    *_, last = events_of(address, max_tokens=20)
    assert last["type"] == "error"
    assert last["error"]["type"] in ("api_error", "overloaded_error")
    assert last["error"]["message"]
    assert last["request_id"]


def test_the_package_raises_what_a_stream_says(scripted: Scripted) -> None:
    with messages_client(scripted(FakeEngine([300] * 20, lose_after=5))) as client, pytest.raises(anthropic.APIStatusError):
        streamed(client, max_tokens=20)


def test_a_refusal_comes_before_the_stream(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        streamed(claude, model="other")
    assert caught.value.type == "not_found_error"

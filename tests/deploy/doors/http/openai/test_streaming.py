"""Streams: framing as curl sees it, usage, a client that goes away, an engine that fails in the midst of it."""

import asyncio
import contextlib
import json
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from deploy.frontend.service.service import Service
from scheduler.protocol.messages import Failure
from tests.deploy.doors.http.conftest import MODEL, PATIENCE_S, Host, Scripted, ScriptedCluster, Stats, until
from tests.deploy.frontend.fake_engine import FakeEngine

PROMPT = "def add(a, b):\n"
HELLO = [{"role": "user", "content": "Say hello."}]
ENDLESS: dict[str, Any] = {"max_tokens": 1900, "extra_body": {"ignore_eos": True}}


def curl(address: str, path: str, body: dict[str, object], *options: str) -> str:
    """Headers and body, as they came over the wire."""
    command = ["curl", "-sNi", *options, f"{address}{path}", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    return subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE_S).stdout.decode()


def events_of(body: str) -> list[Any]:
    """The events' contents; the last one is [DONE]."""
    assert body.endswith("\n\n")
    *events, last = body.removesuffix("\n\n").split("\n\n")
    assert last == "data: [DONE]"
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_raw_framing(address: str) -> None:
    asked = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 5, "stream": True}
    head, _, body = curl(address, "/v1/completions", asked).replace("\r\n", "\n").partition("\n\n")
    status, *headers = head.lower().split("\n")
    assert status == "http/1.1 200 ok"
    assert "content-type: text/event-stream; charset=utf-8" in headers
    assert "cache-control: no-cache" in headers
    assert any(header.startswith("x-request-id: ") for header in headers)
    events = events_of(body)
    whole = json.loads(curl(address, "/v1/completions", asked | {"stream": False}).rpartition("\r\n")[2])
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
    assert {event["object"] for event in events} == {"text_completion"}
    assert len({event["id"] for event in events}) == 1
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["length"]
    assert not any("usage" in event for event in events)


def test_include_usage(address: str) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 5, "stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
    *events, last = events_of(curl(address, "/v1/completions", asked).partition("\r\n\r\n")[2])
    assert [event["usage"] for event in events] == [None] * len(events)
    assert last["choices"] == []
    prompt_tokens = last["usage"]["prompt_tokens"]
    assert last["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 5,
        "total_tokens": prompt_tokens + 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_continuous_usage_stats(address: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = {"messages": HELLO, "max_tokens": 5, "stream": True, "ignore_eos": True, "stream_options": options}
    events = events_of(curl(address, "/v1/chat/completions", asked).partition("\r\n\r\n")[2])
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 5


def test_chat_chunks(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "seed": 3, "max_tokens": 8, "n": 2, "logprobs": True}
    whole = client.chat.completions.create(**asked)
    texts, roles, ends = ["", ""], [[], []], [[], []]  # type: tuple[list[str], list[list[Any]], list[list[Any]]]
    logprobs: list[list[Any]] = [[], []]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index].append(choice.delta.role)
            ends[choice.index].append(choice.finish_reason)
            logprobs[choice.index] += (choice.logprobs.content or []) if choice.logprobs else []
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert roles[choice.index] == ["assistant"] + [None] * (len(roles[choice.index]) - 1)
        assert ends[choice.index] == [None] * (len(ends[choice.index]) - 1) + [choice.finish_reason]
        assert choice.logprobs is not None
        assert [one.token for one in logprobs[choice.index]] == [one.token for one in choice.logprobs.content or []]


def test_stream_of_several_prompts(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": [PROMPT, "class A"], "n": 2, "seed": 3, "max_tokens": 8, "logprobs": 1}
    whole = client.completions.create(**asked)
    texts = [""] * 4
    offsets: list[list[int]] = [[], [], [], []]
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            offsets[choice.index] += (choice.logprobs.text_offset or []) if choice.logprobs else []
    assert texts == [choice.text for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset if choice.logprobs else None for choice in whole.choices]


def test_async_client(address: str) -> None:
    async def text(client: openai.AsyncOpenAI, prompt: str, stream: bool) -> str:
        asked: dict[str, Any] = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 8}
        if not stream:
            return str((await client.completions.create(**asked)).choices[0].text)
        chunks = await client.completions.create(**asked, stream=True)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            prompts = [f"def f{number}(" for number in range(12)]
            streamed = await asyncio.gather(*(text(client, prompt, stream=True) for prompt in prompts))
            whole = await asyncio.gather(*(text(client, prompt, stream=False) for prompt in prompts))
            assert streamed == whole

    asyncio.run(scenario())


@contextlib.contextmanager
def asking(address: str, path: str, body: dict[str, object]) -> Iterator[None]:
    """A client that has asked, and goes away without its answer."""
    url, content = httpx.URL(address), json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection((url.host, url.port or 80)) as connection:
        connection.sendall(head.encode() + content)
        yield


def idle(service: Service, stats: Stats) -> bool:
    """Every block is back, and nobody waits."""
    groups = stats().groups
    return service.under_way == 0 and all(group.held_blocks == 0 and group.running == 0 for group in groups)


def test_cancel_in_mid_stream_gives_the_blocks_back(client: openai.OpenAI, service: Service, stats: Stats) -> None:
    with client.completions.create(model=MODEL, prompt=PROMPT, n=4, stream=True, **ENDLESS) as stream:
        next(iter(stream))
        assert stats().groups[0].held_blocks > 0
    until(lambda: idle(service, stats))


def test_a_client_that_goes_away_before_its_answer_gives_the_blocks_back(address: str, service: Service, stats: Stats) -> None:
    finished = stats().finished
    body = {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True, "n": 4}
    with asking(address, "/v1/completions", body):
        until(lambda: stats().groups[0].running == 4)
    until(lambda: idle(service, stats))
    assert stats().finished == finished + 4


def test_a_request_that_is_aborted_by_its_id(host: Host, address: str, service: Service, stats: Stats) -> None:
    async def abort() -> int:
        return service.abort("mine")

    body = {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True}
    with ThreadPoolExecutor(1) as threads:
        url, headers = f"{address}/v1/completions", {"x-request-id": "mine"}
        waiting = threads.submit(httpx.post, url, json=body, headers=headers, timeout=PATIENCE_S)
        until(lambda: service.under_way)
        assert host.run(abort()) == 1
        answer = waiting.result(PATIENCE_S)
    assert (answer.status_code, answer.json()["error"]["code"]) == (499, "aborted")
    until(lambda: idle(service, stats))


# ---- what the engine does is scripted from here on ----


def test_a_client_that_goes_away_is_aborted(scripted: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine([300] * 100, hold_after=3)
    body = {"prompt": [5, 6], "max_tokens": 50, "stream": True}
    with httpx.stream("POST", f"{scripted(engine)}/v1/completions", json=body) as answer:
        lines = answer.iter_lines()  # closes the connection when it is collected
        assert next(lines).startswith("data: ")
        assert engine.aborted == []
    until(lambda: engine.aborted == [0])  # the engine holds: nothing else could have ended it
    assert not caplog.records  # it happens all the time


def test_a_whole_answer_nobody_waits_for_is_aborted(scripted: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine([300] * 100, hold_after=3)
    with asking(scripted(engine), "/v1/chat/completions", {"messages": HELLO}):
        assert engine.holding.wait(PATIENCE_S)
        assert engine.aborted == []
    until(lambda: engine.aborted == [0])
    assert not caplog.records


def test_a_deadline_before_the_first_token_is_a_504(scripted: Scripted) -> None:
    address = scripted(FakeEngine([300] * 100, hold_after=0))
    for stream in (False, True):
        body = {"prompt": [5, 6], "max_tokens": 50, "timeout": 0.2, "stream": stream}
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=PATIENCE_S)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert "0.2 s" in answer.json()["error"]["message"]


def test_a_deadline_in_mid_stream_is_an_event(scripted: Scripted) -> None:
    engine = FakeEngine([300] * 100, hold_after=3)
    body = {"prompt": [5, 6], "max_tokens": 50, "stream": True, "timeout": 2.0}
    answer = httpx.post(f"{scripted(engine)}/v1/completions", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 200
    *events, last = events_of(answer.text)
    assert len(events) >= 1
    assert (last["error"]["type"], last["error"]["code"]) == ("timeout_error", "deadline_exceeded")
    until(lambda: engine.aborted == [0])


def test_an_engine_lost_in_mid_stream_is_an_event(scripted: Scripted) -> None:
    engine = FakeEngine([300] * 100, hold_after=3, lose_after=3)
    client = openai.OpenAI(base_url=f"{scripted(engine)}/v1", api_key="none", max_retries=0)
    chunks = iter(client.completions.create(model=MODEL, prompt=[5, 6], max_tokens=50, stream=True))
    assert next(chunks).choices
    engine.released.set()  # not before: else the answer may not have begun
    with pytest.raises(openai.APIError, match="burnt down"):
        list(chunks)


def test_an_engine_lost_before_the_answer_is_a_503(scripted: Scripted) -> None:
    address = scripted(FakeEngine([300] * 100, lose_after=3))
    answer = httpx.post(f"{address}/v1/completions", json={"prompt": [5, 6]}, timeout=PATIENCE_S)
    assert answer.status_code == 503
    assert "burnt down" in answer.json()["error"]["message"]


def test_an_engine_lost_in_mid_stream_is_not_noticed_if_another_comes(host: Host) -> None:
    engine = FakeEngine([*range(300, 340)], lose_after=3)
    address = host.serve(host.service(ScriptedCluster(engine, lives=20)))
    body = {"prompt": [5, 6], "max_tokens": 30, "n": 2, "stream": True, "logprobs": 1}
    events = events_of(httpx.post(f"{address}/v1/completions", json=body, timeout=PATIENCE_S).text)
    quiet = FakeEngine([*range(300, 340)])
    other = host.serve(host.service(ScriptedCluster(quiet)))
    expected = events_of(httpx.post(f"{other}/v1/completions", json=body, timeout=PATIENCE_S).text)
    assert engine.starts == 10
    for index in range(2):
        assert told(index, events) == told(index, expected)


def told(index: int, events: list[Any]) -> tuple[str, list[str], str | None]:
    """Of one choice: text, tokens with log-probabilities, why it ended."""
    parts = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    tokens = [token for part in parts if part["logprobs"] for token in part["logprobs"]["tokens"]]
    return "".join(part["text"] for part in parts), tokens, parts[-1]["finish_reason"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        (Failure.OVERLOADED, 429, "rate_limit_error"),
        (Failure.UNAVAILABLE, 503, "server_error"),
        (Failure.IMPOSSIBLE, 400, "invalid_request_error"),
        (Failure.FAULT, 500, "server_error"),
        (Failure.TIMED_OUT, 504, "timeout_error"),
    ],
)
def test_what_the_scheduler_refuses_has_its_status(
    scripted: Scripted, failure: Failure, status: int, kind: str, stream: bool
) -> None:
    engine = FakeEngine([300], refuse={5: "no, because"}, failure=failure, retry_after_s=2.5 if status in (429, 503) else 0)
    answer = httpx.post(f"{scripted(engine)}/v1/completions", json={"prompt": [5, 6], "stream": stream}, timeout=PATIENCE_S)
    assert (answer.status_code, answer.headers.get("retry-after")) == (status, "3" if status in (429, 503) else None)
    error = answer.json()["error"]
    assert (error["type"], "no, because" in error["message"]) == (kind, True)


def test_a_refusal_is_what_the_openai_package_expects(scripted: Scripted) -> None:
    engine = FakeEngine([300], refuse={5: "the queue is full"}, failure=Failure.OVERLOADED, retry_after_s=1.0)
    client = openai.OpenAI(base_url=f"{scripted(engine)}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.RateLimitError, match="the queue is full"):
        client.completions.create(model=MODEL, prompt=[5, 6])

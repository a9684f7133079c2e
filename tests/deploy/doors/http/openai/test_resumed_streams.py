"""A stream that was cut is taken up again behind any of its events: nothing twice, nothing missing, whatever was asked."""

import base64
import json
import re
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from cluster.config import EngineConfig
from deploy.config.load import EMBEDDED_MODEL
from deploy.doors.access import ApiKeys
from deploy.frontend.clusters import LocalCluster
from deploy.frontend.service.service import Service
from tests.deploy.doors.http.conftest import KV_MEMORY_BYTES, PATIENCE_S, Host, Scripted, ScriptedCluster
from tests.deploy.doors.http.openai.test_tools import BOTH
from tests.deploy.frontend.fake_engine import FakeEngine

ASKS_FOR_IDS = {"Accept": "text/event-stream"}
PROMPT = "def add(a, b):\n"
HELLO = [{"role": "user", "content": "Say hello."}]
TIMES = 20
"""That a stream is asked for until it has as many events as a test wants: a slow machine tells several tokens in one."""
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("completions", {"prompt": PROMPT, "temperature": 0, "stop": ["\n\n"], "max_tokens": 20}),
    "without a seed": ("completions", {"prompt": PROMPT, "temperature": 1.3, "frequency_penalty": 0.3}),
    "choices of prompts": ("completions", {"prompt": [PROMPT, "x = ["], "n": 2, "seed": 5, "max_tokens": 9}),
    "echo": ("completions", {"prompt": PROMPT, "echo": True, "logprobs": 2, "temperature": 1.0, "max_tokens": 12}),
    "chat": ("chat/completions", {"messages": HELLO, "temperature": 1.0, "n": 2, "logprobs": True, "top_logprobs": 2}),
    "usage": (
        "chat/completions",
        {"messages": HELLO, "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "max_tokens": 10},
    ),
    "tools": (
        "chat/completions",
        {"messages": HELLO, "tools": BOTH, "tool_choice": "required", "temperature": 1.0, "seed": 4, "max_tokens": 90},
    ),
}


@dataclass
class Told:
    """What a client knows after some events."""

    heads: set[tuple[str, int, str]] = field(default_factory=set)
    choices: dict[int, list[Any]] = field(default_factory=dict)
    usage: Any = None

    def take(self, event: dict[str, Any]) -> None:
        self.heads.add((event["id"], event["created"], event["model"]))
        for choice in event["choices"]:
            text, logprobs, calls, roles, ends = self.choices.setdefault(choice["index"], ["", [], [], [], []])
            delta = choice.get("delta", choice)
            text += delta.get("text") or delta.get("content") or ""
            if (table := choice.get("logprobs")) is not None:
                logprobs += table["content"] if "content" in table else zip(*table.values(), strict=True)
            for call in delta.get("tool_calls", ()):
                calls.append((call["index"], call["function"].get("name"), call["function"]["arguments"]))
            roles += [delta["role"]] if "role" in delta else []
            if choice["finish_reason"] is not None:
                ends.append((choice["finish_reason"], choice.get("stop_reason")))
            self.choices[choice["index"]] = [text, logprobs, calls, roles, ends]
        if event.get("usage"):
            usage = event["usage"]
            self.usage = (usage["prompt_tokens"], usage["completion_tokens"])

    def whole(self) -> Any:
        """Comparable: tool calls put together."""
        choices = {}
        for index, (text, logprobs, calls, roles, ends) in self.choices.items():
            names = [name for _, name, _ in calls if name]
            said = json.dumps(logprobs), names, "".join(part for _, _, part in calls), roles, ends
            choices[index] = (text, re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.6f}", said[0]), *said[1:])
        return self.heads, choices, self.usage


def stream(url: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    """The whole of it, and that it has begun as a stream."""
    named = {"X-Request-Id": "mine"} | ASKS_FOR_IDS | {name.replace("_", "-"): value for name, value in headers.items()}
    sent = {name.encode(): value.encode("latin-1") for name, value in named.items()}
    return httpx.post(url, json=body | {"stream": True}, headers=sent, timeout=PATIENCE_S)


def events_of(answer: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    """(id, content) of each event; the end of the stream."""
    assert answer.status_code == 200, answer.text
    *events, last = answer.text.removesuffix("\n\n").split("\n\n")
    assert last == "data: [DONE]"
    parts = [event.partition("\n") for event in events]
    assert all(first.startswith("id: ") and second.startswith("data: {") for first, _, second in parts), answer.text
    return [(first.removeprefix("id: "), json.loads(second.removeprefix("data: "))) for first, _, second in parts]


def told(events: list[tuple[str, dict[str, Any]]]) -> Any:
    client = Told()
    for _, event in events:
        assert "error" not in event, event
        client.take(event)
    return client.whole()


@pytest.fixture(scope="module")
def cluster() -> LocalCluster:
    """In float64, so that it says the same whether a token was decoded or its KV is computed with others."""
    config = EngineConfig(model=str(EMBEDDED_MODEL), local=True, kv_memory=KV_MEMORY_BYTES, threads=1, dtype="float64")
    return LocalCluster(config)


@pytest.fixture(scope="module")
def service(host: Host, cluster: LocalCluster, checkpoint: Path) -> Service:
    return host.service(cluster, checkpoint)


@pytest.fixture(scope="module")
def address(host: Host, service: Service) -> str:
    return host.serve(service)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request comes a second after the one before."""
    seconds = iter(range(1_000_000_000, 2_000_000_000))
    monkeypatch.setattr("deploy.doors.openai.generation.endpoint.time.time", lambda: next(seconds))


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_goes_on_behind_each_of_its_events(address: str, kind: str) -> None:
    path, asked = KINDS[kind]
    url, body = f"{address}/v1/{path}", {"max_tokens": 12} | asked
    whole = next((events for _ in range(TIMES) if len(events := events_of(stream(url, body))) > 3), [])
    assert whole, "tokens are told as they come"
    apart = 4 if kind == "tools" else 1  # a call is long, and each time all of it is computed again
    for last in [*range(0, len(whole) - 1, apart), len(whole) - 1]:
        rest = events_of(stream(url, body, Last_Event_ID=whole[last][0]))
        assert told(whole[: last + 1] + rest) == told(whole), f"behind event {last}"
    assert rest == []


def parts_of(mark: str) -> list[Any]:
    parts: list[Any] = msgspec.msgpack.decode(base64.urlsafe_b64decode(mark + "=="))
    return parts


def test_what_the_client_has_is_not_computed_again(host: Host, cluster: LocalCluster, address: str) -> None:
    def computed() -> int:
        engine = host.run(cluster.status()).engine
        assert engine is not None
        return engine.output_tokens

    url, body = f"{address}/v1/completions", {"prompt": PROMPT, "temperature": 1.0, "max_tokens": 12, "ignore_eos": True}
    whole = events_of(stream(url, body))
    for last, (mark, _) in enumerate(whole):
        ((tokens, *_),) = parts_of(mark)[3]
        before = computed()
        rest = events_of(stream(url, body, Last_Event_ID=mark))
        assert told(whole[: last + 1] + rest) == told(whole)
        assert computed() - before == 12 - tokens


def test_and_again_and_again(address: str) -> None:
    """Each time a little is heard, and each time more is left out."""
    url, body = f"{address}/v1/completions", {"prompt": PROMPT, "temperature": 1.0, "n": 3, "max_tokens": 12}
    whole = events_of(stream(url, body))
    heard = whole[:1]
    while rest := events_of(stream(url, body, Last_Event_ID=heard[-1][0])):
        heard += rest[:4]
    assert told(heard) == told(whole)


def test_ids_are_for_those_who_ask(address: str) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3}
    assert "id: " not in stream(f"{address}/v1/completions", body, Accept="application/json").text
    many = stream(f"{address}/v1/completions", body | {"prompt": [PROMPT] * 13, "n": 5, "max_tokens": 1})
    assert "id: " not in many.text, "they would be longer than what they tell"


def refused(answer: httpx.Response) -> tuple[int, str | None, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


def test_an_id_of_another_request_is_refused_by_name(host: Host, service: Service, address: str) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3}
    url = f"{address}/v1/completions"
    (last, _), *_ = events_of(stream(url, body))
    wrong = (400, "event_id_mismatch", "Last-Event-ID")
    assert refused(stream(url, body | {"max_tokens": 4}, Last_Event_ID=last)) == wrong
    assert refused(stream(url, body, Last_Event_ID=last, X_Request_Id="yours")) == wrong
    assert refused(stream(f"{address}/v1/chat/completions", {"messages": HELLO}, Last_Event_ID=last)) == wrong
    keyed = f"{host.serve(service, keys=ApiKeys(['secret']))}/v1/completions"
    assert refused(stream(keyed, body, Last_Event_ID=last, Authorization="Bearer secret")) == wrong
    assert events_of(stream(url, {"max_tokens": 3, "prompt": PROMPT}, Last_Event_ID=last)), "the order of fields says nothing"


def forged(mark: str, at: int, value: object) -> str:
    """The same, with another part."""
    parts = parts_of(mark)
    parts[at] = value
    return base64.urlsafe_b64encode(msgspec.msgpack.encode(parts)).decode().rstrip("=")


@pytest.mark.parametrize(
    "wrong", ["", "7", "a b", "\xe9", "=", "!!!!", "AAAA", "k" * 400, "gA", "lQ"]
)
def test_what_is_no_id_is_refused_by_name(address: str, wrong: str) -> None:
    answer = stream(f"{address}/v1/completions", {"prompt": PROMPT}, Last_Event_ID=wrong)
    assert refused(answer) == (400, "event_id_invalid", "Last-Event-ID")


def test_so_is_one_that_was_made_up(address: str) -> None:
    url, body = f"{address}/v1/completions", {"prompt": PROMPT, "max_tokens": 3, "temperature": 1.0}
    (last, _), *_ = events_of(stream(url, body))
    for at, value in ((2, []), (2, [-1]), (2, [7, 7]), (3, []), (3, [[-1, 0, True, False]]), (3, [[1, 0, True, False]] * 65)):
        assert refused(stream(url, body, Last_Event_ID=forged(last, at, value)))[1] == "event_id_invalid", (at, value)
    other = stream(url, body, Last_Event_ID=forged(last, 3, [[2, 12345, True, False]]))
    assert refused(other) == (500, "stream_not_resumable", None), "what it says was told is not what was"


def test_it_goes_with_streams(address: str) -> None:
    url, headers = f"{address}/v1/completions", {"Last-Event-ID": "x"}
    answer = httpx.post(url, json={"prompt": PROMPT}, headers=headers, timeout=PATIENCE_S)
    assert refused(answer) == (400, None, "Last-Event-ID")


def test_a_model_that_says_something_else_is_found_out(scripted: Scripted) -> None:
    """In mid-stream too: another choice has gone on before."""
    said = [[300, 301, 302, 303], [400, 401, 402, 403]]
    engine = FakeEngine(lambda _prompt, choice: said[choice], steps_per_delta=1)
    url, body = f"{scripted(engine)}/v1/completions", {"prompt": [5, 6], "n": 2, "max_tokens": 4}
    last, apart = "", 0
    while apart < 2:  # a slow machine tells several tokens in one event
        told = [(mark, event["choices"][0]) for mark, event in events_of(stream(url, body))]
        marks = [mark for mark, choice in told if choice["finish_reason"] is None]
        apart = sum(choice["index"] == 1 and choice["finish_reason"] is None for _, choice in told)
        last = marks[-1] if marks else last
    said[1] = [400, 409, 402, 403]
    answer = stream(url, body, Last_Event_ID=last)
    assert "choice 1 cannot be computed again as it was told" in answer.text


def test_what_nobody_has_read_is_no_reason_to_end_what_is_told_already(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine([300] * 100, steps_per_delta=10)
    body = {"prompt": [5, 6], "max_tokens": 100}
    service = host.service(ScriptedCluster(engine))
    url = f"{host.serve(service)}/v1/completions"
    for _ in range(TIMES):
        whole = [(mark, event["choices"][0]) for mark, event in events_of(stream(url, body))]
        lengths = [*accumulate(len(choice["text"]) for _, choice in whole)]
        late = [event for event, length in zip(whole, lengths, strict=True) if length >= 0.8 * lengths[-1]]
        if near_end := [mark for mark, choice in late if choice["finish_reason"] is None]:
            break
    monkeypatch.setattr(service._frontend, "_most_unread", 20)  # from now on: nobody had promised to read the first one so fast
    assert told(events_of(stream(url, body, Last_Event_ID=near_end[-1])))[1][0][-1] == [("length", None)]

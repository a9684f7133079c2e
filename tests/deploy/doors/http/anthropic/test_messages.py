"""`/v1/messages` and `/v1/messages/count_tokens`, by the `anthropic` package and the checkpoint that ships with Manta."""

import json
from typing import Any

import anthropic
import httpx
import pytest

from deploy.config.serve import ServeConfig
from deploy.frontend.service.service import Service
from tests.deploy.doors.http.anthropic.messages import ask, asked, prompt_tokens, refused, streamed, text_of
from tests.deploy.doors.http.conftest import MODEL, Host, Scripted, messages_client
from tests.deploy.doors.http.openai.test_chat import HELLO, prompt_of
from tests.deploy.doors.http.openai.test_completions import UNUSUAL
from tests.deploy.frontend.fake_engine import FakeEngine

CACHED = {"type": "ephemeral"}
TEXT = {"type": "text", "text": "Say hello."}


def test_a_message_is_what_chat_says(claude: anthropic.Anthropic, http: httpx.Client) -> None:
    answer = ask(claude)
    chats = http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 8, "temperature": 0}).json()
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", MODEL)
    assert answer.id == f"msg_{answer._request_id}"
    assert text_of(answer) == chats["choices"][0]["message"]["content"]
    assert answer.usage.output_tokens == chats["usage"]["completion_tokens"]
    assert prompt_tokens(answer) == chats["usage"]["prompt_tokens"] == len(prompt_of(http, HELLO))


def test_text_may_stand_in_blocks(claude: anthropic.Anthropic, http: httpx.Client) -> None:
    system = [{"role": "system", "content": "Be brief. Be kind."}]
    seen = len(prompt_of(http, [*system, *HELLO]))
    blocks = [{"type": "text", "text": "Be brief. ", "cache_control": CACHED}, {"type": "text", "text": "Be kind."}]
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello.", "citations": None}]
    for given in ("Be brief. Be kind.", blocks):
        for message in (HELLO[0], {"role": "user", "content": parts}):
            assert prompt_tokens(ask(claude, [message], system=given, max_tokens=1)) == seen
    inside = ask(claude, [{"role": "system", "content": "Be brief. Be kind."}, *HELLO], max_tokens=1)
    assert prompt_tokens(inside) == seen


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": [TEXT, {"type": "image", "source": {"type": "url", "url": "http://x"}}]}], "'image'"),
        ([{"role": "user", "content": [{"type": "document", "source": {}, "title": "t", "context": "c"}]}], "'document'"),
        ([{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}], "'tool_use'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0] is of type 'text' and has no text"),
        ([{"role": "user", "content": [{"type": "tool_result", "content": "a"}]}], "tool_use_id"),
        (
            [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [TEXT, {"type": "image"}]}]}],
            "messages[0].content[0].content[1] is of type 'image'",
        ),
        ([{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b"}]}, *HELLO], "id, name and input"),
        ([*HELLO, {"role": "assistant", "content": "The answer is"}], "messages[1] is the assistant's"),
        ([], "messages"),
    ],
)
def test_messages_that_cannot_be_are_named(claude: anthropic.Anthropic, messages: Any, words: str) -> None:
    assert words in refused(claude, messages)


def test_max_tokens(claude: anthropic.Anthropic, http: httpx.Client, scripted: Scripted) -> None:
    few = ask(claude, max_tokens=3)
    assert (few.usage.output_tokens, few.stop_reason) == (3, "max_tokens")
    answer = http.post("/v1/messages", json={"messages": HELLO})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "max_tokens is missing")
    engine = FakeEngine([300] * 20)
    with messages_client(scripted(engine)) as client:
        for tell in (ask, streamed):
            assert tell(client, max_tokens=1_000_000).stop_reason == "model_context_window_exceeded"
            assert tell(client, max_tokens=20).stop_reason == "max_tokens"


def test_stop_sequences(claude: anthropic.Anthropic) -> None:
    whole = text_of(ask(claude, max_tokens=16))
    stop = whole[6:9]
    for tell in (ask, streamed):
        cut = tell(claude, max_tokens=16, stop_sequences=["never said", stop])
        assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
        assert text_of(cut) == whole[: whole.index(stop)]
    assert ask(claude, max_tokens=3).stop_sequence is None
    assert "stop_sequences: 17 is above the 16" in refused(claude, stop_sequences=["x"] * 17)


def test_a_message_may_end_by_itself(scripted: Scripted) -> None:
    with messages_client(scripted(FakeEngine([300, 2]))) as client:
        for tell in (ask, streamed):
            assert (tell(client).stop_reason, tell(client).usage.output_tokens) == ("end_turn", 2)
    with messages_client(scripted(FakeEngine([2]))) as client:
        assert (ask(client).content, streamed(client).content) == ([], [])


def test_how_tokens_are_drawn(claude: anthropic.Anthropic) -> None:
    greedy = text_of(ask(claude))
    assert text_of(ask(claude, temperature=1, top_k=1)) == greedy
    assert text_of(ask(claude, temperature=1, top_p=1e-6)) == greedy
    assert len({text_of(ask(claude, temperature=1)) for _ in range(8)}) > 1
    assert "temperature" in refused(claude, temperature=-1)
    assert "top_p" in refused(claude, top_p=2)


def test_output_format(claude: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [UNUSUAL]}}, "required": ["a"], "additionalProperties": False}
    config = {"format": {"type": "json_schema", "schema": schema}}
    for tell in (ask, streamed):
        assert json.loads(text_of(tell(claude, max_tokens=100, output_config=config))) == {"a": UNUSUAL}
    lost = {"format": {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {"pattern": "("}}}}}
    with pytest.raises(anthropic.UnprocessableEntityError, match=r"output_config\.format: "):
        ask(claude, output_config=lost)
    nested = {"format": {"type": "json_schema", "schema": {"items": json.loads("[" * 300 + "]" * 300)}}}
    assert "output_config.format.schema nests" in refused(claude, output_config=nested)


def test_effort_reaches_the_template(claude: anthropic.Anthropic) -> None:
    """The one of this checkpoint reads `enable_thinking`."""
    plain = prompt_tokens(ask(claude, max_tokens=1))
    assert prompt_tokens(ask(claude, max_tokens=1, output_config={"effort": "none"})) > plain
    assert prompt_tokens(ask(claude, max_tokens=1, output_config={"effort": "high"})) == plain


def test_fields_of_no_consequence(claude: anthropic.Anthropic) -> None:
    beside = {
        "service_tier": "auto", "inference_geo": "eu", "diagnostics": None, "cache_control": None,
        "extra_body": {"speed": "fast", "user_profile_id": "u", "workspace_id": "w"},
        "extra_headers": {"anthropic-beta": "a-thing-2026-01-01,another"},
    }  # fmt: skip
    assert text_of(ask(claude, **beside)) == text_of(ask(claude))
    for name, value in (("container", "c"), ("mcp_servers", [{"type": "url"}])):
        assert f"{name} is not supported" in refused(claude, extra_body={name: value})


def test_unknown_fields_are_said_in_a_header(http: httpx.Client) -> None:
    answer = http.post("/v1/messages", json=asked(context_management={"edits": []}))
    assert answer.status_code == 200
    assert "context_management" in answer.headers["warning"]
    result = {"type": "tool_result", "tool_use_id": "a", "content": [TEXT | {"flavour": 1}]}
    inside = http.post("/v1/messages", json=asked([{"role": "user", "content": [result]}], tools=[WEATHER | {"taste": 1}]))
    assert inside.status_code == 200
    for place in ("messages[].content[].content[].flavour", "tools[].taste"):
        assert f"the field {place} is not known here" in inside.headers["warning"]
    message = http.post("/v1/messages", json=asked(stop_sequence=["a"])).json()["error"]["message"]
    assert "did you mean 'stop_sequences'?" in message


def test_metadata_says_whose_account_it_is(claude: anthropic.Anthropic) -> None:
    """Prefixes are shared within one account alone."""
    shared = [{"role": "user", "content": "Whose is this? " * 30}]

    def read(user: str) -> int:
        return ask(claude, shared, max_tokens=1, metadata={"user_id": user}).usage.cache_read_input_tokens or 0

    assert [read("one"), read("two")] == [0, 0]
    assert read("one") > 100


def test_cached_tokens_are_told(claude: anthropic.Anthropic, http: httpx.Client) -> None:
    """Of a second turn, all of the first one's prompt and answer that the template repeats."""
    first: list[Any] = [{"role": "user", "content": "Tell me of caches, at length. " * 20}]
    marked: list[Any] = [{"role": "user", "content": [{"type": "text", "text": first[0]["content"], "cache_control": CACHED}]}]
    fresh = ask(claude, marked, max_tokens=5)
    usage, whole = fresh.usage, len(prompt_of(http, first))
    assert (usage.input_tokens, usage.cache_creation_input_tokens, usage.cache_read_input_tokens) == (1, whole - 1, 0)
    again = ask(claude, first, max_tokens=5).usage
    assert (again.input_tokens, again.cache_creation_input_tokens, again.cache_read_input_tokens) == (1, 0, whole - 1)
    for tell in (ask, streamed):
        second = tell(claude, [*first, {"role": "assistant", "content": text_of(fresh)}, *HELLO], max_tokens=1).usage
        assert (second.cache_read_input_tokens or 0) >= whole
    assert (second.input_tokens, second.cache_creation_input_tokens) == (1, 0)


WEATHER = {"name": "get_weather", "description": "Of a city.", "input_schema": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"system": "Be brief."},
        {"system": [TEXT], "tools": [WEATHER], "tool_choice": {"type": "auto"}},
        {"tools": [WEATHER], "tool_choice": {"type": "none"}},
        {"thinking": {"type": "disabled"}},
        {"output_config": {"effort": "none"}, "cache_control": CACHED},
    ],
)
def test_count_tokens_is_the_usage(claude: anthropic.Anthropic, fields: dict[str, Any]) -> None:
    messages: Any = [*HELLO, {"role": "assistant", "content": UNUSUAL}, {"role": "user", "content": [TEXT, TEXT]}]
    counted = claude.messages.count_tokens(model=MODEL, messages=messages, **fields).input_tokens
    assert counted == prompt_tokens(ask(claude, messages, max_tokens=1, **fields)) > 10


def test_what_cannot_be_counted(claude: anthropic.Anthropic, host: Host, service: Service) -> None:
    count: Any = claude.messages.count_tokens
    with pytest.raises(anthropic.NotFoundError):
        count(model="other", messages=HELLO)
    with pytest.raises(anthropic.BadRequestError, match=r"tools\[0\]"):
        count(model=MODEL, messages=HELLO, tools=[WEATHER | {"name": "a b"}])
    strict = host.serve(service, ServeConfig(strict_fields=True))
    answer = httpx.post(f"{strict}/v1/messages/count_tokens", json={"messages": HELLO, "max_tokens": 5})
    assert "unknown field 'max_tokens'" in answer.json()["error"]["message"]

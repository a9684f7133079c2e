"""Tools and thoughts in `/v1/messages`: offered, forced, told, and sent again."""

import json
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import Message, ThinkingBlock, ToolUseBlock

from deploy.doors.anthropic.signatures import signature
from deploy.text.tokenizer import Tokenizer
from tests.deploy.doors.http.anthropic.messages import ask, asked, prompt_tokens, refused, said, streamed
from tests.deploy.doors.http.anthropic.test_messages_streams import ANSWER, CALL, THOUGHT, thinker
from tests.deploy.doors.http.conftest import MODEL, Scripted, messages_client
from tests.deploy.doors.http.openai.test_chat import HELLO
from tests.deploy.doors.http.openai.test_tools import WEATHER as CHAT_WEATHER
from tests.deploy.doors.http.openai.test_tools import is_weather, saying
from tests.deploy.frontend.fake_engine import FakeEngine

__all__ = ["thinker"]  # a fixture

CITY: dict[str, Any] = CHAT_WEATHER["function"]  # type: ignore[assignment]
WEATHER: dict[str, Any] = {"name": "get_weather", "description": CITY["description"], "input_schema": CITY["parameters"]}
NOTHING = {"type": "object", "additionalProperties": False}
CLOCK: dict[str, Any] = {"name": "get_time", "type": "custom", "input_schema": NOTHING}
BOTH = [WEATHER, CLOCK]
WEATHER_ASKED = {"type": "tool", "name": "get_weather"}


def calls_of(message: Message) -> list[ToolUseBlock]:
    return [block for block in message.content if isinstance(block, ToolUseBlock)]


def thoughts_of(message: Message) -> list[ThinkingBlock]:
    return [block for block in message.content if isinstance(block, ThinkingBlock)]


def seen(engine: Any, folder: Path) -> str:
    """The last prompt that the model was given."""
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer.decode(memoryview(engine.requests[-1].tokens).cast("i").tolist())


def test_a_tool_is_named(claude: anthropic.Anthropic) -> None:
    for tell in (ask, streamed):
        message = tell(claude, tools=BOTH, tool_choice=WEATHER_ASKED, max_tokens=200)
        (call,) = calls_of(message)
        assert (message.stop_reason, len(message.content)) == ("tool_use", 1)
        assert (call.name, call.id[:6]) == ("get_weather", "toolu_")
        assert is_weather(json.dumps(call.input))


def test_any_tool_and_no_two_at_once(claude: anthropic.Anthropic) -> None:
    for _ in range(3):
        choice = {"type": "any", "disable_parallel_tool_use": True}
        (call,) = calls_of(ask(claude, tools=BOTH, tool_choice=choice, max_tokens=300, temperature=1))
        assert (call.name == "get_time" and call.input == {}) or is_weather(json.dumps(call.input))


def test_a_tool_that_is_not_offered_is_none(claude: anthropic.Anthropic) -> None:
    plain = prompt_tokens(ask(claude))
    assert prompt_tokens(ask(claude, tools=BOTH, tool_choice={"type": "none"})) == plain
    assert prompt_tokens(ask(claude, tools=BOTH, tool_choice={"type": "auto"})) > plain


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0] is 'web_search_20250305'"),
        ({"tools": [WEATHER, {"type": "bash_20250124", "name": "bash"}]}, "tools[1] is 'bash_20250124'"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema is missing"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name is missing"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0]"),
        ({"tools": [{"name": "a", "input_schema": {"type": "string"}}]}, "tools[0].input_schema must be a JSON schema"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice: name the tool"),
        ({"tools": [CLOCK], "tool_choice": WEATHER_ASKED}, "'get_weather', which is not among the tools"),
        ({"tool_choice": {"type": "any"}}, "no tools are given"),
        ({"tools": [WEATHER], "tool_choice": {"type": "often"}}, "tool_choice.type"),
    ],
)
def test_tools_that_cannot_be(claude: anthropic.Anthropic, fields: dict[str, Any], words: str) -> None:
    assert words in refused(claude, **fields)


def test_what_a_schema_does_not_enforce(http: httpx.Client) -> None:
    odd = WEATHER | {"input_schema": {"type": "object", "properties": {"a": {"type": "string", "format": "path"}}}}
    fields = asked(tools=[odd], tool_choice=WEATHER_ASKED, max_tokens=1)
    assert "not enforced" in http.post("/v1/messages", json=fields).headers["warning"]
    answer = http.post("/v1/messages", json=fields | {"tools": [odd | {"strict": True}]})
    assert (answer.status_code, answer.json()["error"]["type"]) == (422, "invalid_request_error")


def test_a_call_and_its_result_may_be_sent_again(scripted: Scripted, checkpoint: Path) -> None:
    """As the package's own loop of a tool's user does it."""
    engine = saying(f"Let me see.\n{CALL}")
    with messages_client(scripted(engine, checkpoint)) as client:
        message = ask(client, tools=BOTH, max_tokens=200)
        assert [block.type for block in message.content] == ["text", "tool_use"]
        (call,) = calls_of(message)
        assert call.input == {"city": "Paris", "unit": "C"}
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
        turns = [*HELLO, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
        ask(client, turns, tools=BOTH, max_tokens=1)
        assert f"assistant\nLet me see.{CALL}" in seen(engine, checkpoint)
        assert "tool\nsunny" in seen(engine, checkpoint)
        several = [result | {"is_error": True}, {"type": "text", "text": "And now"}, {"type": "text", "text": "?"}]
        ask(client, [*turns[:-1], {"role": "user", "content": several}], tools=BOTH, max_tokens=1)
        assert "tool\nError: sunny" in seen(engine, checkpoint)
        assert "user\nAnd now?" in seen(engine, checkpoint)
        bare = {"type": "tool_result", "tool_use_id": call.id}
        assert ask(client, [*turns[:-1], {"role": "user", "content": [bare]}], tools=BOTH, max_tokens=1).content


def test_the_packages_own_loop_of_calls(scripted: Scripted, checkpoint: Path) -> None:
    """It asks at `/v1/messages?beta=true`, calls the functions that it was given, and asks again."""
    tokenizer = Tokenizer.load(checkpoint)
    assert tokenizer is not None

    def reply(prompt: list[int], _: int) -> list[int]:
        said = ANSWER if "sunny in Paris" in tokenizer.decode(prompt) else f"Let me see.\n{CALL}"
        return [*tokenizer.encode(said), *tokenizer.encode("<|im_end|>")]

    @anthropic.beta_tool
    def get_weather(city: str, unit: str) -> str:
        """The weather of a city."""
        return f"sunny in {city}, in {unit}"

    for stream in (False, True):
        with messages_client(scripted(FakeEngine(reply), checkpoint)) as client:
            asked: Any = {"model": MODEL, "messages": HELLO, "max_tokens": 200, "tools": [get_weather], "stream": stream}
            steps: Any = client.beta.messages.tool_runner(**asked)
            messages = [step.get_final_message() if stream else step for step in steps]
            assert [message.stop_reason for message in messages] == ["tool_use", "end_turn"]
            assert messages[-1].content[0].text == ANSWER


def test_fields_beside_a_call_and_a_tool(claude: anthropic.Anthropic) -> None:
    beside = {
        "allowed_callers": ["direct"], "cache_control": {"type": "ephemeral"}, "defer_loading": False, "input_examples": [{}],
        "eager_input_streaming": True,
    }  # fmt: skip
    call = {"type": "tool_use", "id": "a", "name": "get_time", "input": {}}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "noon"}]}

    def tokens(tool: dict[str, Any], called: dict[str, Any]) -> int:
        turns = [*HELLO, {"role": "assistant", "content": [called]}, result]
        return prompt_tokens(ask(claude, turns, tools=[tool], max_tokens=1))

    assert tokens(CLOCK | beside, call | {"caller": {"type": "direct"}}) == tokens(CLOCK, call)


def test_a_thought_is_a_block_and_may_be_sent_again(scripted: Scripted, thinker: Path) -> None:
    engine = saying(f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}")
    with messages_client(scripted(engine, thinker)) as client:
        for tell in (ask, streamed):
            message = tell(client, max_tokens=200)
            (thought,) = thoughts_of(message)
            assert (thought.thinking, thought.signature) == (THOUGHT, signature(THOUGHT))
            assert [block.type for block in message.content] == ["thinking", "text"]
            details = message.usage.output_tokens_details
            assert details is not None
            assert 0 < details.thinking_tokens < message.usage.output_tokens
        hidden = {"type": "redacted_thinking", "data": "secret"}
        anothers = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
        for before in (message.content, [hidden, *message.content], [anothers]):
            assert ask(client, [*HELLO, {"role": "assistant", "content": before}, *HELLO], max_tokens=1).content
            assert "secret" not in seen(engine, thinker)
        changed = thought.model_dump() | {"thinking": "No."}
        words = refused(client, [*HELLO, {"role": "assistant", "content": [changed]}, *HELLO])
        assert "messages[1].content[0] is no longer the thought that was signed" in words


def test_thinking_switches_the_template(scripted: Scripted, thinker: Path) -> None:
    engine = saying(f"<think>{THOUGHT}</think>{ANSWER}")
    address = scripted(engine, thinker)
    with messages_client(address) as client:
        for kind, thinks in (("enabled", True), ("adaptive", True), ("disabled", False)):
            budget = {"budget_tokens": 1024} if kind == "enabled" else {}
            message = ask(client, thinking={"type": kind, **budget}, max_tokens=2000)
            assert bool(thoughts_of(message)) == thinks
            assert seen(engine, thinker).endswith("<think></think>") != thinks
        hidden = ask(client, thinking={"type": "adaptive", "display": "omitted"}, max_tokens=2000)
        assert said(streamed(client, thinking={"type": "adaptive", "display": "omitted"}, max_tokens=2000)) == said(hidden)
        assert [(block.thinking, block.signature) for block in thoughts_of(hidden)] == [("", signature(""))]
        assert "thinking.type" in refused(client, thinking={"type": "always"})
    bounded = {"type": "enabled", "budget_tokens": 1024}
    answer = httpx.post(f"{address}/v1/messages", json=asked(thinking=bounded, max_tokens=2000))
    assert "thinking.budget_tokens: not enforced" in answer.headers["warning"]

"""Tools: offered, forced, called; whole and in parts; and told of again in the next turn."""

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessageToolCall

from deploy.config.load import EMBEDDED_MODEL
from deploy.config.serve import TOOL_PARSERS, ServeConfig
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from deploy.text.tokenizer import Tokenizer
from tests.deploy.doors.dialects.conftest import QWEN_TEMPLATE
from tests.deploy.doors.http.conftest import MODEL, PATIENCE_S, Host, Scripted, ScriptedCluster
from tests.deploy.doors.http.openai.test_chat import HELLO, chat, prompt_of, refused
from tests.deploy.frontend.fake_engine import FakeEngine

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time"}}
BOTH = [WEATHER, CLOCK]
WEATHER_ASKED = {"type": "function", "function": {"name": "get_weather"}}
SPOKEN = 'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "unit": "C"}}\n</tool_call>'


def calls_of(answer: ChatCompletion) -> list[ChatCompletionMessageToolCall]:
    calls = answer.choices[0].message.tool_calls or []
    assert all(isinstance(call, ChatCompletionMessageToolCall) for call in calls)
    return [call for call in calls if isinstance(call, ChatCompletionMessageToolCall)]


def is_weather(arguments: str) -> bool:
    asked = json.loads(arguments)
    return asked.keys() == {"city", "unit"} and asked["city"] in ("Paris", "Rome") and asked["unit"] in ("C", "F")


def is_called_well(call: ChatCompletionMessageToolCall) -> bool:
    if call.function.name == "get_weather":
        return is_weather(call.function.arguments)
    return (call.function.name, call.function.arguments) == ("get_time", "{}")


def test_tool_choice_names_a_function(client: openai.OpenAI) -> None:
    answer = chat(client, tools=BOTH, tool_choice=WEATHER_ASKED, parallel_tool_calls=False, max_tokens=200)
    (call,) = calls_of(answer)
    assert (call.type, call.function.name, call.id[:5]) == ("function", "get_weather", "call_")
    assert is_weather(call.function.arguments)
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("tool_calls", None)


def test_tool_choice_required_and_parallel_tool_calls(client: openai.OpenAI) -> None:
    asked = {"tools": BOTH, "tool_choice": "required", "temperature": 1.0, "seed": 4}
    (call,) = calls_of(chat(client, parallel_tool_calls=False, max_tokens=200, **asked))
    assert is_called_well(call)
    endless = {"logit_bias": {"0": -100, "2": -100}, "max_tokens": 300}  # it may end, but does not want to
    *whole, _ = calls_of(chat(client, **asked, **endless))
    assert len(whole) > 1
    assert all(is_called_well(call) for call in whole)
    assert len({call.id for call in whole}) == len(whole)


def test_calls_are_streamed_as_deltas(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL, "messages": HELLO, "tools": BOTH, "tool_choice": WEATHER_ASKED, "temperature": 0, "max_tokens": 200,
        "parallel_tool_calls": False,
    }  # fmt: skip
    (whole,) = calls_of(client.chat.completions.create(**asked))
    names, arguments, ends = [], [], []
    for chunk in client.chat.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        assert not choice.delta.content
        ends.append(choice.finish_reason)
        for call in choice.delta.tool_calls or []:
            assert call.index == 0
            assert call.function is not None
            assert (call.id is None) == (call.type is None) == (call.function.name is None)
            names += [call.function.name] if call.function.name else []
            arguments.append(call.function.arguments or "")
    assert (names, "".join(arguments)) == ([whole.function.name], whole.function.arguments)
    assert len(arguments) > 3
    assert ends == [None] * (len(ends) - 1) + ["tool_calls"]


def saying(text: str) -> FakeEngine:
    tokenizer = Tokenizer.load(EMBEDDED_MODEL)
    assert tokenizer is not None
    return FakeEngine([*tokenizer.encode(text), *tokenizer.encode("<|im_end|>")])


@pytest.fixture
def speaking(scripted: Scripted, checkpoint: Path) -> openai.OpenAI:
    """A model that says what `SPOKEN` says."""
    return openai.OpenAI(base_url=f"{scripted(saying(SPOKEN), checkpoint)}/v1", api_key="none", max_retries=0)


def test_a_model_may_speak_and_call(speaking: openai.OpenAI) -> None:
    answer = chat(speaking, tools=BOTH, tool_choice="auto", max_tokens=200)
    (call,) = calls_of(answer)
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris", "unit": "C"})
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Let me see.", "tool_calls")
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "tools": BOTH, "stream": True, "max_tokens": 200}
    text, arguments = "", ""
    for chunk in speaking.chat.completions.create(**asked):
        text += chunk.choices[0].delta.content or ""
        for part in chunk.choices[0].delta.tool_calls or []:
            arguments += (part.function.arguments or "") if part.function else ""
    assert (text, arguments) == ("Let me see.", call.function.arguments)


CODED = "Let me see.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"


def test_the_parser_may_be_named(host: Host, checkpoint: Path) -> None:
    """This checkpoint's template shows another format."""
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "tools": BOTH, "max_tokens": 200}
    for parser in ("qwen3_coder", "none"):
        service = host.service(ScriptedCluster(saying(CODED)), checkpoint)
        address = host.serve(service, ServeConfig(tool_parser=parser))
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
            choice = client.chat.completions.create(**asked).choices[0]
            if parser == "none":
                assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CODED, None, "stop")
                assert refused(client, tools=BOTH, tool_choice="required").param == "tool_choice"
                continue
            (call,) = choice.message.tool_calls
            assert (choice.message.content, choice.finish_reason) == ("Let me see.\n", "tool_calls")
            assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
            deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
            told = [call.function.arguments for delta in deltas for call in delta.tool_calls or ()]
            assert "".join(delta.content or "" for delta in deltas) == "Let me see.\n"
            assert json.loads("".join(told)) == {"city": "Paris"}
            assert len(told) > 3


@pytest.mark.few(2)
@pytest.mark.parametrize("parser", [name for name in TOOL_PARSERS if name not in ("auto", "none", "hermes")])
def test_a_forced_call_in_the_syntax_of_any_family(host: Host, service: Service, parser: str) -> None:
    address = host.serve(service, ServeConfig(tool_parser=parser))
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "tools": BOTH, "tool_choice": WEATHER_ASKED, "max_tokens": 300}
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        for seed in range(2):
            answer = client.chat.completions.create(**asked, seed=seed, temperature=1.0)
            (call,) = calls_of(answer)
            assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (None, "tool_calls")
            assert call.function.name == "get_weather"
            assert is_weather(call.function.arguments)


def test_a_chat_template_from_a_file(host: Host, tmp_path: Path) -> None:
    """With it a checkpoint calls tools whose own template knows of none."""
    file = tmp_path / "template.jinja"
    file.write_text(QWEN_TEMPLATE)
    model = ServedModel.read(MODEL, EMBEDDED_MODEL, None, chat_template=str(file))
    service = host.service(ScriptedCluster(saying(SPOKEN)), model=model)
    with openai.OpenAI(base_url=f"{host.serve(service)}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        (call,) = calls_of(chat(client, tools=BOTH, max_tokens=200))
        assert call.function.name == "get_weather"


def test_a_named_function_is_called_once(client: openai.OpenAI) -> None:
    endless = {"logit_bias": {"0": -100, "2": -100}, "max_tokens": 300, "temperature": 1.0, "seed": 4}
    calls = calls_of(chat(client, tools=BOTH, tool_choice=WEATHER_ASKED, parallel_tool_calls=True, **endless))
    assert [call.function.name for call in calls] == ["get_weather"]


def test_without_tools_a_call_is_text(speaking: openai.OpenAI) -> None:
    for fields in ({}, {"tools": BOTH, "tool_choice": "none"}):
        choice = chat(speaking, max_tokens=200, **fields).choices[0]
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (SPOKEN, None, "stop")


def test_tools_are_shown_to_the_model(client: openai.OpenAI, http: httpx.Client) -> None:
    def prompt_tokens(**fields: object) -> int:
        usage = chat(client, max_tokens=1, **fields).usage
        assert usage is not None
        return usage.prompt_tokens

    plain = len(prompt_of(http, HELLO))
    shown = http.post("/tokenize", json={"messages": HELLO, "tools": BOTH}).json()["count"]
    assert shown > plain
    assert prompt_tokens(tools=BOTH) == shown
    assert prompt_tokens(tools=BOTH, tool_choice="none") == plain


def test_a_call_and_its_result_may_be_sent_again(client: openai.OpenAI, http: httpx.Client) -> None:
    answer = chat(client, tools=BOTH, tool_choice=WEATHER_ASKED, max_tokens=200)
    (call,) = calls_of(answer)[:1]
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages = [*HELLO, answer.choices[0].message.model_dump(), result]
    assert chat(client, messages, tools=BOTH).choices[0].message.role == "assistant"
    tokenizer = Tokenizer.load(EMBEDDED_MODEL)
    assert tokenizer is not None
    text = "".join(map(tokenizer.token_text, prompt_of(http, messages)))
    assert '<tool_call>\n{"name": "get_weather", "arguments": {' in text
    assert "sunny" in text


def test_chat_template_kwargs(http: httpx.Client) -> None:
    thinking = http.post("/tokenize", json={"messages": HELLO}).json()["count"]
    body = {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False}}
    assert http.post("/tokenize", json=body).json()["count"] > thinking
    usage = http.post("/v1/chat/completions", json=body | {"max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens"] > thinking


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": "often"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": WEATHER_ASKED}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ],
)
def test_tools_that_cannot_be(client: openai.OpenAI, fields: dict[str, object], param: str) -> None:
    assert refused(client, **fields).param == param


def test_tools_of_a_checkpoint_that_knows_of_none(scripted: Scripted) -> None:
    client = openai.OpenAI(base_url=f"{scripted(FakeEngine([300]))}/v1", api_key="none", max_retries=0)
    refusal = refused(client, tools=[WEATHER])
    assert refusal.param == "tools"
    assert "--tool-parser" in refusal.message
    assert "--chat-template" in refusal.message

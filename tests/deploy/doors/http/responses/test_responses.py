"""`/v1/responses`, driven by the `openai` package: what may be asked, and what comes back whole."""

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseOutputMessage, ResponseReasoningItem

from deploy.config.serve import ServeConfig
from deploy.frontend.service.service import Service
from tests.deploy.doors.dialects.conftest import QWEN_TEMPLATE
from tests.deploy.doors.http.conftest import MODEL, Host
from tests.deploy.doors.http.openai.test_chat import chat
from tests.deploy.doors.http.openai.test_formats import SCHEMA, Thing, is_thing
from tests.deploy.doors.http.openai.test_reasoning import ANSWER as SPOKEN_ANSWER
from tests.deploy.doors.http.openai.test_reasoning import OPENING, OUTPUT, THOUGHT
from tests.deploy.doors.http.openai.test_tools import BOTH, SPOKEN, is_weather
from tests.deploy.doors.http.responses.responding import (
    HELLO,
    SAID,
    TOOLS,
    WEATHER_ASKED,
    Saying,
    posted,
    refused,
    respond,
)  # fmt: skip

CALL = SPOKEN.removeprefix("Let me see.\n")


def test_a_response_is_whole(client: openai.OpenAI, http: httpx.Client) -> None:
    answer = respond(client, max_output_tokens=60)
    assert (answer.object, answer.model, answer.id[:5], answer.status) == ("response", MODEL, "resp_", "completed")
    (message,) = answer.output
    assert isinstance(message, ResponseOutputMessage)
    assert (message.role, message.status, message.id[:4]) == ("assistant", "completed", "msg_")
    assert answer.output_text == chat(client, max_tokens=60).choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.usage.input_tokens == http.post("/tokenize", json={"messages": SAID}).json()["count"]
    assert (answer.error, answer.incomplete_details, answer.completed_at is not None) == (None, None, True)
    Response.model_validate(http.post("/v1/responses", json={"input": HELLO}).json())
    long = "What is cached is not computed again. " * 20
    respond(client, long)
    assert respond(client, long).usage.input_tokens_details.cached_tokens > 100  # type: ignore[union-attr]


def test_max_output_tokens(client: openai.OpenAI) -> None:
    answer = respond(client, max_output_tokens=5)
    assert (answer.status, answer.usage and answer.usage.output_tokens) == ("incomplete", 5)
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"  # type: ignore[union-attr]
    error = refused(client, max_output_tokens=10**6)
    assert (error.param, error.code) == ("max_output_tokens", "context_length_exceeded")
    assert "max_output_tokens=1000000" in error.message


def test_input_in_every_form(saying: Saying) -> None:
    model = saying("Hello.")

    def asked(input: object, **fields: object) -> str:
        respond(model.client, input, **fields)
        return model.asked()

    plain = asked(HELLO)
    assert HELLO in plain
    assert asked(SAID) == plain
    assert asked([{"type": "message", "role": "user", "content": [{"type": "input_text", "text": HELLO}]}]) == plain
    assert asked([{"role": "user", "content": [{"type": "input_text", "text": part} for part in ("Say ", "hello.")]}]) == plain
    brief = [{"role": "system", "content": "Be brief."}, *SAID]
    chat(model.client, brief)
    as_chat = model.asked()
    assert asked(brief) == as_chat
    assert asked(HELLO, instructions="Be brief.") == as_chat
    assert asked([{"role": "developer", "content": "Be brief."}, *SAID]) == as_chat
    chat(model.client, [*SAID, {"role": "assistant", "content": "No."}, *SAID])
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    assert asked([*SAID, refusal, *SAID]) == model.asked()


TEMPLATE = QWEN_TEMPLATE.replace(
    "{{- '\\n' + message.content }}", "{{- '\\n' + message.content }}[{{ message.reasoning_content or '' }}]"
)


def test_an_answer_may_be_sent_again_as_it_came(saying: Saying) -> None:
    """What a chat's one message says in its parts is the same prompt."""
    model = saying(OUTPUT + CALL, TEMPLATE)
    first = respond(model.client, tools=TOOLS, max_output_tokens=400)
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
    call = first.output[2]
    assert isinstance(call, ResponseFunctionToolCall)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": [{"type": "input_text", "text": "sunny"}]}
    respond(model.client, [*SAID, *first.output, result], tools=TOOLS)
    as_items = model.asked()
    message = chat(model.client, max_tokens=400, tools=BOTH).choices[0].message.model_dump()
    again = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"}
    chat(model.client, [*SAID, message, again], tools=BOTH)
    assert as_items == model.asked()
    assert f"[{THOUGHT}]" in as_items


def test_tools_over_two_turns(client: openai.OpenAI) -> None:
    first = respond(client, tools=TOOLS, tool_choice=WEATHER_ASKED, max_output_tokens=200)
    (call,) = first.output
    assert isinstance(call, ResponseFunctionToolCall)
    assert (call.name, call.status, call.id and call.id[:3], call.call_id[:5]) == ("get_weather", "completed", "fc_", "call_")
    assert is_weather(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    by_items = respond(client, [*SAID, call, result], tools=TOOLS)
    by_id = respond(client, [result], tools=TOOLS, previous_response_id=first.id)
    assert by_id.output_text == by_items.output_text
    assert by_id.usage is not None
    assert by_id.usage.input_tokens == by_items.usage.input_tokens  # type: ignore[union-attr]
    assert (by_id.tools[0].name, by_id.previous_response_id) == ("get_weather", first.id)  # type: ignore[union-attr]


def test_text_and_calls_keep_their_order(saying: Saying) -> None:
    model = saying(f"{SPOKEN}\nAnd now?\n{CALL}")
    answer = respond(model.client, tools=TOOLS, max_output_tokens=300)
    assert [item.type for item in answer.output] == ["message", "function_call"] * 2
    assert answer.output_text.split() == ["Let", "me", "see.", "And", "now?"]
    single = respond(model.client, tools=TOOLS, max_output_tokens=300, parallel_tool_calls=False)
    assert [item.type for item in single.output].count("function_call") == 1
    assert single.parallel_tool_calls is False


def test_a_call_that_is_cut_off(saying: Saying) -> None:
    cut = saying(SPOKEN.partition(", ")[0])
    answer = respond(cut.client, tools=TOOLS, max_output_tokens=len(cut.tokenizer.encode(SPOKEN.partition(", ")[0])))
    assert (answer.status, answer.output[-1].type) == ("incomplete", "message")
    begun = SPOKEN[: SPOKEN.index('"unit"')]
    model = saying(begun)
    answer = respond(model.client, tools=TOOLS, max_output_tokens=len(model.tokenizer.encode(begun)))
    call = answer.output[-1]
    assert isinstance(call, ResponseFunctionToolCall)
    assert (answer.status, call.status) == ("incomplete", "incomplete")
    assert call.arguments.startswith('{"city": "Paris"')


def test_tool_choice(client: openai.OpenAI, saying: Saying) -> None:
    def called(**fields: object) -> list[str]:
        answer = respond(client, tools=TOOLS, max_output_tokens=200, parallel_tool_calls=False, **fields)
        return [item.name for item in answer.output if isinstance(item, ResponseFunctionToolCall)]

    assert called(tool_choice=WEATHER_ASKED) == ["get_weather"]
    assert called(tool_choice="required")[0] in ("get_weather", "get_time")
    clock = {"type": "function", "name": "get_time"}
    assert called(tool_choice={"type": "allowed_tools", "mode": "required", "tools": [clock]}) == ["get_time"]
    model = saying(SPOKEN)
    assert respond(model.client, tools=TOOLS, tool_choice="none", max_output_tokens=200).output_text == SPOKEN
    for choice in ({"type": "web_search_preview"}, {"type": "function"}, {"type": "allowed_tools", "tools": []}):
        assert refused(client, tools=TOOLS, tool_choice=choice).param == "tool_choice"


@pytest.mark.parametrize("kind", ["web_search", "file_search", "mcp", "code_interpreter", "custom", "image_generation"])
def test_tools_that_somebody_else_would_run_are_refused(client: openai.OpenAI, kind: str) -> None:
    error = refused(client, tools=[*TOOLS, {"type": kind}])
    assert error.param == "tools[2].type"
    assert kind in error.message


def test_json_schema(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "name": "thing", "strict": True, "schema": SCHEMA}
    answer = respond(client, text={"format": form}, temperature=1.5, max_output_tokens=200, extra_body={"seed": 2})
    assert is_thing(answer.output_text)
    assert answer.text is not None
    assert answer.text.format is not None
    assert answer.text.format.type == "json_schema"
    parsed = client.responses.parse(model=MODEL, input="A thing.", text_format=Thing, max_output_tokens=200)
    assert isinstance(parsed.output_parsed, Thing)
    loose = {"format": {"type": "json_object"}}
    assert isinstance(json.loads(respond(client, text=loose, max_output_tokens=300).output_text), dict)
    error = refused(client, text={"format": {"type": "json_schema", "name": "thing"}})
    assert error.param == "text.format"
    assert "response_format" not in error.message


def test_thoughts_are_reasoning_items(saying: Saying) -> None:
    model = saying(OUTPUT, QWEN_TEMPLATE)
    answer = respond(model.client, max_output_tokens=300)
    thought, message = answer.output
    assert isinstance(thought, ResponseReasoningItem)
    assert thought.content is not None
    assert ([part.text for part in thought.content], thought.summary, thought.status) == ([THOUGHT], [], "completed")
    assert (message.type, answer.output_text) == ("message", SPOKEN_ANSWER)
    assert answer.usage is not None
    thought_tokens = len(model.tokenizer.encode(f"<think>\n{THOUGHT}\n</think>"))
    assert answer.usage.output_tokens_details.reasoning_tokens == thought_tokens
    summed = respond(model.client, max_output_tokens=300, reasoning={"summary": "auto"}).output[0]
    assert isinstance(summed, ResponseReasoningItem)
    assert [part.text for part in summed.summary] == [THOUGHT]
    cut = respond(model.client, max_output_tokens=8)
    assert ([item.type for item in cut.output], cut.status) == (["reasoning"], "incomplete")
    assert cut.output[0].status == "incomplete"  # type: ignore[union-attr]


def test_a_thought_without_an_answer(saying: Saying) -> None:
    answer = respond(saying("<think>\nHm.\n</think>", QWEN_TEMPLATE).client, max_output_tokens=100)
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert (answer.status, answer.output_text) == ("completed", "")


def test_reasoning_effort_reaches_the_template(saying: Saying) -> None:
    model = saying("Hm.</think>Yes.", "{{ reasoning_effort or '' }}" + OPENING)
    answer = respond(model.client, reasoning={"effort": "low"}, max_output_tokens=100)
    assert model.asked().startswith("low")
    assert answer.reasoning is not None
    assert answer.reasoning.effort == "low"
    off = respond(model.client, max_output_tokens=100, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert [item.type for item in off.output] == ["message"]


LOGPROBS = ["message.output_text.logprobs"]


def test_logprobs(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"include": LOGPROBS, "top_logprobs": 3, "max_output_tokens": 5}
    (message,) = respond(client, **asked).output
    assert isinstance(message, ResponseOutputMessage)
    told = message.content[0].to_dict()["logprobs"]
    as_chat = chat(client, logprobs=True, top_logprobs=3, max_tokens=5).choices[0].logprobs
    assert as_chat is not None
    assert as_chat.content is not None
    assert told == [entry.model_dump() for entry in as_chat.content]
    assert respond(client).output[0].to_dict()["content"][0]["logprobs"] == []  # type: ignore[index]
    assert refused(client, top_logprobs=3).param == "top_logprobs"


def test_sampling_fields_are_those_of_chat(client: openai.OpenAI) -> None:
    for fields in (
        {"temperature": 2.0, "seed": 9}, {"temperature": 2.0, "seed": 9, "top_k": 1}, {"stop": ["plaus"]},
        {"temperature": 2.0, "seed": 3, "top_p": 0.5}, {"frequency_penalty": 2.0, "presence_penalty": 1.0},
        {"repetition_penalty": 5.0}, {"min_tokens": 12, "ignore_eos": True}, {"logit_bias": {"300": 100}},
        {"guided_regex": "[0-9]{3}"}, {"guided_choice": ["yes", "no"]}, {"min_p": 0.9, "temperature": 1.5, "seed": 1},
    ):  # fmt: skip
        as_chat = chat(client, max_tokens=16, extra_body=fields).choices[0].message.content
        answer = respond(client, max_output_tokens=16, extra_body=fields)
        assert answer.output_text == as_chat, fields
    assert answer.temperature == 1.5
    assert refused(client, extra_body={"priority": -1}).param == "priority"
    assert refused(client, extra_body={"guided_regex": "a", "guided_choice": ["b"]}).param == "guided_choice"


def test_fields_that_come_back(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "instructions": "Be brief.", "metadata": {"topic": "greeting"}, "user": "ann", "safety_identifier": "a",
        "prompt_cache_key": "k", "truncation": "disabled", "store": False, "max_tool_calls": 3,
    }  # fmt: skip
    answer = respond(client, **fields).model_dump()
    assert {name: answer[name] for name in fields} == fields
    assert refused(client, metadata={"topic": "x" * 513}).param == "metadata[...]"
    assert refused(client, metadata={str(number): "" for number in range(17)}).param == "metadata"


def test_fields_of_no_consequence_are_ignored(address: str) -> None:
    ignored: dict[str, object] = {
        "image": {"context_compression": "auto"}, "max_tool_calls": 3, "prompt_cache_key": "key",
        "prompt_cache_options": {"mode": "explicit"}, "prompt_cache_retention": "24h", "safety_identifier": "someone",
        "service_tier": "auto", "stream_options": {"include_obfuscation": False}, "text": {"verbosity": "low"},
        "reasoning": {"context": "auto", "mode": "pro"}, "include": ["reasoning.encrypted_content"],
    }  # fmt: skip
    told = posted(address, temperature=0, **ignored)
    assert told.headers.get("warning") is None
    assert told.json()["output"][0]["content"] == posted(address, temperature=0).json()["output"][0]["content"]
    known: dict[str, object] = {"id": "msg_1", "status": "completed", "phase": "final_answer", "created_by": "x"}
    known |= {"caller": None, "namespace": None}
    spoken = {"role": "assistant", "content": [{"type": "output_text", "text": "Hi.", "annotations": [], "logprobs": []}]}
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": "sealed"}
    assert posted(address, input=[*SAID, sealed, spoken | known, *SAID]).headers.get("warning") is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("background", True),
        ("background_options", {}),
        ("conversation", "conv_1"),
        ("prompt", {"id": "pmpt_1"}),
        ("context_management", [{"type": "compaction"}]),
        ("moderation", {"model": "m"}),
        ("access_programs", {"cyber": "standard"}),
    ],
)
def test_fields_of_another_world_are_refused(client: openai.OpenAI, field: str, value: object) -> None:
    error = refused(client, extra_body={field: value})
    assert error.param == field
    assert "not supported" in error.message


def test_background_false_asks_for_nothing(client: openai.OpenAI) -> None:
    assert respond(client, background=False).background is False


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [*SAID, {"content": "x"}]}, "input[1].role"),
        ({"input": [{"role": "nobody", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "assistant", "content": [{"type": "refusal", "text": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "computer_call", "call_id": "c"}]}, "input[0].type"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, "input[0].name"),
        ({"input": [*SAID, {"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[1].call_id"),
        ({"input": [{"role": "user", "content": "x", "contents": "red"}]}, "input[0].contents"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"type": "array"}}]}, "tools[0].parameters"),
        ({"tools": [{"name": "f"}]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": TOOLS, "tool_choice": "often"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["everything"]}, "include[0]"),
        ({"top_p": 2}, "top_p"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format"),
        ({"text": {"formats": {}}}, "text.formats"),
        ({"max_output_token": 3}, "max_output_token"),
    ],
)
def test_errors_name_the_field(address: str, fields: dict[str, object], param: str) -> None:
    answer = posted(address, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert '"function": {' not in answer.json()["error"]["message"], "as chat writes tools"


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        respond(client, model="huge")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_unknown_fields(host: Host, service: Service, address: str) -> None:
    fields: dict[str, Any] = {"zzzzz": 1, "input": [SAID[0] | {"yyyyy": 1}]}
    warning = posted(address, **fields).headers["warning"]
    assert '"the field zzzzz is not known here, and ignored"' in warning
    assert '"the field input[].yyyyy is not known here, and ignored"' in warning
    strict = host.serve(service, ServeConfig(strict_fields=True))
    assert posted(strict, **fields).json()["error"]["code"] == "unknown_parameter"


def test_what_is_not_enforced_is_said_under_its_own_name(address: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)"}}}
    answer = posted(address, text={"format": {"type": "json_schema", "name": "a", "schema": schema}}, max_output_tokens=100)
    assert "text.format" in answer.headers["warning"]


def test_last_event_id_is_refused(address: str) -> None:
    body = {"input": HELLO, "stream": True}
    answer = httpx.post(f"{address}/v1/responses", json=body, headers={"Last-Event-ID": "x"}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Last-Event-ID")


"""Outputs that must match something: whatever the model would rather say, they do."""

import json
import re
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from deploy.config.load import EMBEDDED_MODEL
from deploy.doors.warnings import HEADER
from deploy.text.tokenizer import Tokenizer
from tests.deploy.doors.http.conftest import MODEL
from tests.deploy.doors.http.openai.test_chat import HELLO, chat
from tests.deploy.doors.http.openai.test_completions import complete

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "size": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["colour", "size"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}


def is_thing(text: str | None) -> bool:
    thing = json.loads(text or "")
    return thing.keys() == SCHEMA["properties"].keys() and thing["colour"] in ("red", "green") and 1 <= thing["size"] <= 99  # type: ignore[attr-defined]


class Thing(pydantic.BaseModel):
    colour: Literal["red", "green"]
    size: int = pydantic.Field(ge=1, le=99)


def test_json_schema(client: openai.OpenAI) -> None:
    for seed in range(3):
        hot: dict[str, Any] = {"temperature": 1.5, "seed": seed, "max_tokens": 200, "response_format": JSON_SCHEMA}
        choice = chat(client, **hot).choices[0]
        assert is_thing(choice.message.content)
        assert choice.finish_reason == "stop"
        streamed: dict[str, Any] = {"model": MODEL, "messages": HELLO, "stream": True}
        chunks = client.chat.completions.create(**streamed, **hot)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content


def test_json_schema_of_a_pydantic_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "A thing."}], response_format=Thing, max_tokens=200
    )
    assert isinstance(answer.choices[0].message.parsed, Thing)


def test_json_object(client: openai.OpenAI) -> None:
    tokenizer = Tokenizer.load(EMBEDDED_MODEL)
    assert tokenizer is not None
    (brace,) = tokenizer.encode("}")
    asked: dict[str, Any] = {"response_format": {"type": "json_object"}, "logit_bias": {str(brace): 100}, "max_tokens": 64}
    assert json.loads(chat(client, **asked).choices[0].message.content or "") == {}
    assert chat(client, response_format={"type": "text"}).choices[0].message.content == chat(client).choices[0].message.content


def test_guided_regex(client: openai.OpenAI) -> None:
    for seed in range(3):
        body = {"guided_regex": r"[a-c]{3}-\d{2}"}
        text = complete(client, temperature=2.0, seed=seed, max_tokens=64, extra_body=body).choices[0].text
        assert re.fullmatch(r"[a-c]{3}-\d{2}", text)


def test_guided_choice(client: openai.OpenAI) -> None:
    choices = ["one", "another (one)", "a\nthird"]
    texts = {
        complete(client, temperature=2.0, seed=seed, max_tokens=64, extra_body={"guided_choice": choices}).choices[0].text
        for seed in range(6)
    }
    assert texts <= set(choices)


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)])
def test_guided_json(client: openai.OpenAI, schema: object) -> None:
    assert is_thing(complete(client, max_tokens=200, extra_body={"guided_json": schema}).choices[0].text)


def test_guided_grammar(client: openai.OpenAI) -> None:
    body = {"guided_grammar": 'start: "(" start ")" | "x"'}
    text = complete(client, temperature=1.0, seed=1, max_tokens=200, extra_body=body).choices[0].text
    assert re.fullmatch(r"\(*x\)*", text)
    assert text.count("(") == text.count(")")


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"regex": "[ab]{3}"}, "[ab]{3}"),
        ({"choice": ["one", "(two)"], "whitespace_pattern": "x"}, r"one|\(two\)"),
        ({"json": {"const": 17}, "json_object": False}, "17"),
        ({"grammar": 'start: "x" "y"'}, "xy"),
        ({"json_object": True}, r"\{.*"),
    ],
)
def test_structured_outputs(client: openai.OpenAI, asked: dict[str, object], pattern: str) -> None:
    """vLLM's name for the `guided_` fields, since it has these no more."""
    text = complete(client, temperature=1.0, seed=1, max_tokens=8, extra_body={"structured_outputs": asked}).choices[0].text
    assert re.fullmatch(pattern, text, re.DOTALL)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "structured_outputs.regex"),
    ],
)
def test_structured_outputs_that_cannot_be(http: httpx.Client, asked: dict[str, object], param: str) -> None:
    answer = http.post("/v1/completions", json={"prompt": "a", **asked})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("allowed_token_ids", [5]), ("bad_words", ["x"]), ("include_stop_str_in_output", True), ("truncate_prompt_tokens", 4),
        ("use_beam_search", True), ("continue_final_message", True), ("logits_processors", ["x"]), ("return_token_ids", True),
        ("return_tokens_as_token_ids", True), ("skip_special_tokens", False), ("add_generation_prompt", False),
        ("add_special_tokens", True), ("chat_template", "x"), ("documents", [{"text": "x"}]), ("echo", True),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused(http: httpx.Client, field: str, value: object) -> None:
    """vLLM's: without them the answer would be another one than was asked for, and nobody would see it."""
    asked = {"messages": HELLO, "max_tokens": 1}
    answer = http.post("/v1/chat/completions", json={**asked, field: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    for usual in (not value, None) if isinstance(value, bool) else (None,):
        answer = http.post("/v1/chat/completions", json={**asked, field: usual})
        assert (answer.status_code, HEADER in answer.headers) == (200, False)


@pytest.mark.parametrize(("field", "value", "usual"), [("add_special_tokens", False, True), ("prompt_embeds", "eA==", None)])
def test_prompts_that_would_be_others_are_refused(http: httpx.Client, field: str, value: object, usual: object) -> None:
    asked = {"prompt": "a", "max_tokens": 1}
    answer = http.post("/v1/completions", json={**asked, field: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    assert http.post("/v1/completions", json={**asked, field: usual}).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"), [("add_generation_prompt", False), ("continue_final_message", True), ("chat_template", "x")]
)
def test_tokens_of_another_prompt_are_refused(http: httpx.Client, field: str, value: object) -> None:
    answer = http.post("/tokenize", json={"messages": HELLO, field: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    plain = http.post("/tokenize", json={"messages": HELLO})
    usual = None if value == "x" else not value
    assert http.post("/tokenize", json={"messages": HELLO, field: usual}).json() == plain.json()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"extra_body": {"guided_regex": "(?=x)"}}, "guided_regex"),
        ({"extra_body": {"guided_grammar": "start: nobody"}}, "guided_grammar"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strange"}}}}, "response_format"),
    ],
)
def test_what_cannot_be_compiled_is_a_422(client: openai.OpenAI, fields: dict[str, object], param: str) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        chat(client, **fields)
    assert (caught.value.param, caught.value.code) == (param, "invalid_grammar")


def test_what_is_not_enforced_is_said_in_a_header(http: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"p": {"type": "string", "format": "path"}}, "additionalProperties": False}
    for body in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"guided_json": schema},
    ):
        for stream in (False, True):  # the second time the grammar is known to be valid
            answer = http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 4, "stream": stream} | body)
            assert (answer.status_code, "Unknown format: path" in answer.headers[HEADER]) == (200, True)
    strict = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert http.post("/v1/chat/completions", json={"messages": HELLO, "response_format": strict}).status_code == 422
    plain = http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 4, "response_format": JSON_SCHEMA})
    assert (plain.status_code, HEADER in plain.headers) == (200, False)

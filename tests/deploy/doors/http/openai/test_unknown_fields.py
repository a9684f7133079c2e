"""Fields that this server does not know: ignored with a warning, refused where another was meant, or where that is wanted."""

from typing import Any

import httpx
import pytest

from deploy.config.serve import ServeConfig
from deploy.frontend.service.service import Service
from tests.deploy.doors.http.conftest import PATIENCE_S, Host
from tests.deploy.doors.http.openai.test_chat import HELLO

CHAT = "/v1/chat/completions"
ASKED: dict[str, Any] = {"messages": HELLO, "max_tokens": 2, "temperature": 0}

ELSEWHERE = (
    "spaces_between_special_tokens", "mm_processor_kwargs", "structural_tag", "request_id", "kv_transfer_params",
    "vllm_xargs", "include_reasoning", "separate_reasoning", "enable_thinking", "thinking", "thinking_budget", "reasoning",
    "provider", "transforms", "plugins", "length_penalty", "mirostat", "keep_alive", "zzzzz", "frequencies",
)  # fmt: skip
"""What vLLM, SGLang, OpenRouter and Ollama know, or nobody."""


def warned(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.headers.get("warning", ""))


@pytest.mark.parametrize("field", ELSEWHERE)
def test_what_others_know_is_ignored(http: httpx.Client, field: str) -> None:
    answer = http.post(CHAT, json=ASKED | {field: True})
    assert warned(answer) == f'299 manta "the field {field} is not known here, and ignored"'


def test_an_answer_is_the_same(http: httpx.Client) -> None:
    plain = http.post(CHAT, json=ASKED)
    assert warned(plain) == ""
    more = ASKED | {"zzzzz": {"messages": [{"x": 1}]}, "logit_bias": {"5": 1.5}, "seed": 2**62, "stream_options": None}
    told = http.post(CHAT, json=more)
    assert warned(told).count("299") == 1
    assert told.json()["choices"] == plain.json()["choices"]
    assert warned(http.post(CHAT, json=ASKED | {"zzzzz": None})) == "", "null is the same as leaving it out"


def test_a_stream_is_warned_too(http: httpx.Client) -> None:
    with http.stream("POST", CHAT, json=ASKED | {"stream": True, "zzzzz": 1, "stream_options": {"usage": True}}) as answer:
        assert warned(answer) == (
            '299 manta "the field zzzzz is not known here, and ignored", '
            '299 manta "the field stream_options.usage is not known here, and ignored"'
        )
        assert "[DONE]" in "".join(answer.iter_text())


def test_messages_as_others_write_them(http: httpx.Client) -> None:
    call = {"id": "1", "type": "function", "caller": {"x": 1}, "function": {"name": "f", "arguments": "{}", "strict": True}}
    said: dict[str, Any] = {
        "role": "assistant", "content": "Hi.", "id": "msg_1", "refusal": None, "annotations": [], "audio": None,
        "function_call": None, "provider_specific_fields": {"a": 1}, "reasoning": None, "reasoning_content": "Hm.",
        "tool_calls": None, "name": None, "tool_call_id": None, "citations": None,
    }  # fmt: skip
    plain = {"messages": [*HELLO, {"role": "assistant", "content": "Hi."}, *HELLO]}
    answer = http.post("/tokenize", json={"messages": [*HELLO, said, *HELLO]})
    assert warned(answer) == ""
    assert answer.json() == http.post("/tokenize", json=plain).json()
    more = [*HELLO, said | {"tool_calls": [call], "cache": 1, "audio": {"id": "a"}}, said | {"cache": 2}]
    assert warned(http.post("/tokenize", json={"messages": more})) == ", ".join(
        f'299 manta "the field messages[].{name} is not known here, and ignored"'
        for name in ("tool_calls[].caller", "tool_calls[].function.strict", "cache")
    )


def test_an_answer_without_content_may_be_sent_again(http: httpx.Client) -> None:
    def prompt(**fields: object) -> object:
        answer = http.post("/tokenize", json={"messages": [*HELLO, {"role": "assistant"} | fields, *HELLO]})
        assert answer.status_code == 200, answer.text
        return answer.json()

    empty = prompt(content="")
    for fields in ({"reasoning": "Hm."}, {"reasoning_content": "Hm."}, {"audio": {"id": "audio_1"}}):
        assert prompt(content=None, **fields) == empty
    assert prompt(content=None, refusal="I will not.") == prompt(content="I will not.")
    assert prompt(content="Yes.", refusal="I will not.") == prompt(content="Yes.")


@pytest.mark.parametrize(
    ("body", "param", "near"),
    [
        ({"temprature": 1}, "temprature", "temperature"),
        ({"max_new_tokens": 1}, "max_new_tokens", "max_tokens"),
        ({"max_output_tokens": 1}, "max_output_tokens", "max_tokens"),
        ({"zzzzz": 1, "top_kk": 1}, "top_kk", "top_k"),
        ({"messages": [*HELLO, {"role": "user", "contnt": "x"}]}, "messages[1].contnt", "content"),
        ({"messages": [*HELLO, {"tool_calls": [{"functon": {}}]}]}, "messages[1].tool_calls[0].functon", "function"),
    ],
)
def test_what_is_misspelt_is_refused(http: httpx.Client, body: dict[str, Any], param: str, near: str) -> None:
    answer = http.post(CHAT, json=ASKED | body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, "unknown_parameter")
    assert f"did you mean {near!r}?" in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param", "near"),
    [
        ("/v1/responses", {"input": "x", "max_tokens": 2}, "max_tokens", "max_output_tokens"),
        ("/v1/responses", {"input": "x", "response_format": {}}, "response_format", "text"),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 2, "stop": ["x"]}, "stop", "stop_sequences"),
    ],
)
def test_what_another_door_calls_so_is_not_left_out_in_silence(
    http: httpx.Client, path: str, body: dict[str, Any], param: str, near: str
) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert param in answer.json()["error"]["message"]
    assert f"did you mean {near!r}?" in answer.json()["error"]["message"]


def test_nor_is_it_taken_for_a_misspelling(http: httpx.Client) -> None:
    asked = {"messages": HELLO, "max_tokens": 2, "seed": 5}
    assert "seed is not known here" in warned(http.post("/v1/messages", json=asked))


def test_what_is_wrong_beside_it_is_still_wrong(http: httpx.Client) -> None:
    answer = http.post(CHAT, json=ASKED | {"zzzzz": 1, "n": "2"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
    many = http.post(CHAT, json=ASKED | {f"x{at}": 1 for at in range(65)})
    assert (many.status_code, many.json()["error"]["code"]) == (400, "unknown_parameter")
    assert "more than 64 unknown fields" in many.json()["error"]["message"]


def test_names_that_no_header_can_hold(http: httpx.Client) -> None:
    name = 'a"\r\nX-Evil: 1\u00e9\u4f60'
    answer = http.post(CHAT, json=ASKED | {name: 1})
    assert "X-Evil" not in answer.headers
    assert "X-Evil" in warned(answer)


def test_strict_fields(host: Host, service: Service, http: httpx.Client) -> None:
    address = host.serve(service, ServeConfig(strict_fields=True))
    url = address + CHAT
    documents = http.get("/openapi.json"), httpx.get(f"{address}/openapi.json", timeout=PATIENCE_S)
    for document, strict in zip(documents, (False, True), strict=True):
        schema = document.json()["components"]["schemas"]["ChatRequest"]
        assert (schema.get("additionalProperties") is False) == strict
    for body, param in (({"zzzzz": 1}, "zzzzz"), ({"messages": [HELLO[0] | {"zzzzz": 1}]}, "messages[0].zzzzz")):
        answer = httpx.post(url, json=ASKED | body, timeout=PATIENCE_S)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert "leave it out" in answer.json()["error"]["message"]

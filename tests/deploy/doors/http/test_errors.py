"""Whatever goes wrong is said in OpenAI's form, with the right status and the name of the field."""

from typing import Any

import httpx
import pytest

from deploy.config.load import EMBEDDED_MODEL, engine_config
from deploy.config.serve import ServeConfig
from deploy.frontend.clusters import LocalCluster
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from tests.deploy.doors.http.conftest import MODEL, Host

HELLO = [{"role": "user", "content": "Say hello."}]
MISSING = object()
CONTEXT_LENGTH = "this model's maximum context length is 2048 tokens"
"""By these words litellm knows the error."""


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response that must be in OpenAI's form."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.json().keys() == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": MISSING}, "prompt", "prompt is missing"),
        ({"prompt": {}}, "prompt", "expected str | array, got object"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty list"),
        ({"prompt": [""]}, "prompt", "empty"),
        ({"prompt": ["a", 1]}, "prompt", "mixes"),
        ({"prompt": [[1], "a"]}, "prompt", "mixes"),
        ({"prompt": [1, None]}, "prompt[1]", "got null"),
        ({"prompt": [-1]}, "prompt", "outside the vocabulary of 4096"),
        ({"prompt": [10**30]}, "prompt", "outside the vocabulary"),
        ({"prompt": "x " * 3000}, "prompt", "length is 2048 tokens, output included"),
        ({"prompt": ["a"] * 65}, "prompt", "65 is above the 64 that this server allows (max_prompts)"),
        ({"prompt": [[1] * 2000] * 64, "prompt_logprobs": 20}, "prompt_logprobs", "more than 524288 log-probabilities"),
        ({"n": 0}, "n", "expected int >= 1"),
        ({"n": "2"}, "n", "got str"),
        ({"n": 17}, "n", "17 is above the 16 that this server allows (max_choices)"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens: 0 goes with echo=true"),
        ({"max_tokens": 10**20}, "max_tokens", "expected int <= 2147483647"),
        ({"max_tokens": 2048}, "max_tokens", "max_tokens=2048 with the 1 tokens of the prompt are above it"),
        ({"min_tokens": 20}, "min_tokens", "min_tokens=20 is above max_tokens=16"),
        ({"temperature": -0.1}, "temperature", "expected float >= 0.0"),
        ({"top_p": -0.5}, "top_p", "expected float >= 0.0"),
        ({"presence_penalty": 3}, "presence_penalty", "<= 2.0"),
        ({"logprobs": 21}, "logprobs", "<= 20"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "got str"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]", "<= 100.0"),
        ({"logit_bias": {"4096": 1}}, "logit_bias", "outside the vocabulary"),
        ({"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "logit_bias", "above the 1024"),
        ({"stop": [""]}, "stop", "empty string"),
        ({"stop": ["x" * (7 << 20)]}, "stop", "7340032 characters are above the 16384"),
        ({"cache_salt": "x" * (7 << 20)}, "cache_salt", "are above the 1024"),
        ({"prompt": "x " * (7 << 19)}, "prompt", "the prompt has 7340032 bytes, and 2048 tokens hold"),
        ({"stop": ["x"] * 10, "stop_token_ids": [7] * 7}, "stop", "17 is above the 16"),
        ({"stop_token_ids": [4096]}, "stop_token_ids", "outside the vocabulary"),
        ({"timeout": 0}, "timeout", "expected float > 0.0"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"stream": True, "stream_options": {"include_usages": True}}, "stream_options.include_usages", "did you mean"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"max_completion_tokens": 1}, "max_completion_tokens", "did you mean 'max_tokens'?"),
        ({"guided_choice": []}, "guided_choice", "must be a list of texts"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "exclude each other"),
        ({"guided_regex": "a", "min_tokens": 1}, "min_tokens", "exclude each other"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    ],
)
def test_bad_fields_are_named(http: httpx.Client, body: dict[str, Any], param: str, words: str) -> None:
    asked = {name: value for name, value in ({"prompt": "a"} | body).items() if value is not MISSING}
    error = error_of(http.post("/v1/completions", json=asked), 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("stream", [False, True])
def test_more_output_than_the_model_takes(http: httpx.Client, field: str, stream: bool) -> None:
    """Refused by the door, under the name that the client has used."""
    asked = {"messages": [{"role": "user", "content": "a"}], field: 2048, "stream": stream}
    error = error_of(http.post("/v1/chat/completions", json=asked), 400)
    assert (error["param"], error["code"]) == (field, "context_length_exceeded")
    assert error["message"].startswith(CONTEXT_LENGTH)
    assert "lower max_tokens to" in error["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "it is empty"),
        (b"{", "not valid JSON"),
        (b'{"user": "\xff"}', "not valid JSON"),
        (b'{"user": "\\ud800"}', r"not valid JSON: \ud800 is half of a surrogate pair"),
        (b"[]", "expected object, got array"),
        (b'{"metadata": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_bodies_that_are_no_request(http: httpx.Client, body: bytes, words: str) -> None:
    error = error_of(http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"}), 400)
    assert error["param"] is None
    assert words in error["message"]


def test_what_a_client_made_up_is_not_told_at_length(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "a", "model": "y" * 1_000_000})
    assert "..." in error_of(answer, 404)["message"]
    assert len(answer.content) < 500
    answer = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "x" * 1_000_000: 1})
    assert "xxx..." in answer.headers["warning"]
    assert len(answer.headers["warning"]) < 200


def test_a_bad_query_is_named(http: httpx.Client) -> None:
    assert error_of(http.get("/status.json", params={"history": "perhaps"}), 400)["param"] == "history"


def test_unprocessable_grammar(http: httpx.Client) -> None:
    error = error_of(http.post("/v1/completions", json={"prompt": "a", "guided_regex": "("}), 422)
    assert (error["param"], error["code"]) == ("guided_regex", "invalid_grammar")


def test_a_prompt_that_is_too_long_has_the_code_that_clients_know(http: httpx.Client) -> None:
    answers = [
        http.post("/v1/completions", json={"prompt": "x " * 3000}),
        http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x " * 3000}]}),
    ]
    errors = [error_of(answer, 400) for answer in answers]
    assert [error["code"] for error in errors] == ["context_length_exceeded"] * 2
    assert all(error["message"].startswith(CONTEXT_LENGTH) for error in errors)


def test_unknown_model(http: httpx.Client) -> None:
    answers = [
        http.post("/v1/completions", json={"model": "gpt-9", "prompt": "a"}),
        http.post("/v1/chat/completions", json={"model": "gpt-9", "messages": HELLO}),
        http.post("/tokenize", json={"model": "gpt-9", "prompt": "a"}),
        http.post("/detokenize", json={"model": "gpt-9", "tokens": [5]}),
        http.get("/v1/models/gpt-9"),
    ]
    for answer in answers:
        error = error_of(answer, 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert f"ask for '{MODEL}'" in error["message"]


def test_unknown_paths_and_methods(http: httpx.Client) -> None:
    assert "/v1/nothing" in error_of(http.get("/v1/nothing"), 404)["message"]
    wrong_method = http.delete("/v1/completions")
    assert "DELETE" in error_of(wrong_method, 405)["message"]
    assert wrong_method.headers["allow"] == "POST"


def test_a_body_that_is_not_called_json_is_refused(http: httpx.Client) -> None:
    """A page of another origin may send text without asking first, but not JSON."""

    def sent_as(kind: str | None) -> httpx.Response:
        headers = {} if kind is None else {"content-type": kind}
        return http.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)

    encoded = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = http.post("/v1/completions", content=b"\x1f\x8b", headers=encoded)
    assert "encoded as gzip" in error_of(answer, 415)["message"]
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        error_of(sent_as(kind), 415)
    assert sent_as("application/json; charset=utf-8").status_code == 200


def test_nobody_is_ready_before_the_cluster_is(host: Host) -> None:
    config = engine_config({"local": True})
    waiting = Service(ServedModel.read(MODEL, EMBEDDED_MODEL, None), LocalCluster(config))  # nobody runs it
    with httpx.Client(base_url=host.serve(waiting)) as client:
        assert client.get("/health").json() == {"status": "ok"}
        answers = [
            client.get("/ready"),
            client.post("/v1/completions", json={"prompt": "a"}),
            client.post("/v1/completions", json={"prompt": "a", "stream": True}),
        ]
        for answer in answers:
            assert error_of(answer, 503)["type"] == "server_error"
            assert answer.headers["retry-after"] == "1"
        assert "starting" in answers[0].json()["error"]["message"]
        assert client.get("/metrics").status_code == 200
        assert client.get("/v1/models").status_code == 200


def test_a_fault_of_the_server_says_no_more_than_its_request_id(host: Host) -> None:
    class Broken(LocalCluster):
        async def status(self, maps: bool = False) -> Any:  # noqa: ARG002
            raise ZeroDivisionError("a secret")

    service = Service(ServedModel.read(MODEL, EMBEDDED_MODEL, None), Broken(engine_config({"local": True})))
    answer = httpx.get(f"{host.serve(service)}/metrics", headers={"x-request-id": "mine"})
    message = error_of(answer, 500)["message"]
    assert ("mine" in message, "secret" in message) == (True, False)
    assert answer.headers["x-request-id"] == "mine"


def test_a_server_may_be_stricter(host: Host, service: Service) -> None:
    config = ServeConfig(max_choices=1, max_prompts=1, max_stops=1, max_logit_bias=1, request_timeout_s=0.001)
    address = host.serve(service, config)
    for body in (
        {"n": 2},
        {"best_of": 2},
        {"prompt": ["a", "b"]},
        {"stop": ["a", "b"]},
        {"logit_bias": {"5": 1, "6": 1}},
    ):
        error_of(httpx.post(f"{address}/v1/completions", json={"prompt": "a"} | body), 400)
    late = httpx.post(f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 1900, "timeout": 60})
    assert error_of(late, 504)["code"] == "deadline_exceeded"


def test_log_probabilities_are_held_for_so_many_at_once(
    http: httpx.Client, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"prompt": [1, 2, 3, 4], "max_tokens": 8, "logprobs": 1, "ignore_eos": True}
    monkeypatch.setattr(service.logprobs, "most_of_one", 4)
    assert error_of(http.post("/v1/completions", json=asked), 400)["param"] == "logprobs"
    assert http.post("/v1/completions", json=asked | {"stream": True}).status_code == 200, "it holds none"
    monkeypatch.setattr(service.logprobs, "most_of_one", 1000)
    monkeypatch.setattr(service.logprobs, "most_of_all", 10)
    refused = http.post("/v1/completions", json=asked | {"prompt_logprobs": 2})
    assert error_of(refused, 429)["param"] == "prompt_logprobs"
    assert int(refused.headers["retry-after"]) >= 1
    monkeypatch.undo()
    assert http.post("/v1/completions", json=asked | {"prompt_logprobs": 2}).status_code == 200
    assert service.logprobs.count == 0

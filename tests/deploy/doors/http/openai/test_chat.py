"""`/v1/chat/completions`, driven by the `openai` package over the checkpoint that ships with Manta."""

from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion

from deploy.config.load import EMBEDDED_MODEL
from deploy.text.content import FunctionCall, Message, ToolCall, for_template
from deploy.text.tokenizer import Tokenizer
from tests.deploy.doors.http.conftest import MODEL
from tests.deploy.doors.http.openai.test_completions import UNUSUAL, forced

HELLO = [{"role": "user", "content": "Say hello."}]


def chat(client: openai.OpenAI, messages: object = HELLO, **fields: object) -> ChatCompletion:
    """Greedy, unless the fields say otherwise."""
    asked = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 8} | fields
    answer = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    assert isinstance(answer, ChatCompletion)
    return answer


def text_of(client: openai.OpenAI, messages: object = HELLO, **fields: object) -> str | None:
    return chat(client, messages, **fields).choices[0].message.content


def prompt_of(http: httpx.Client, messages: object) -> list[int]:
    """What the model sees."""
    answer = http.post("/tokenize", json={"messages": messages})
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["tokens"]
    return tokens


def refused(client: openai.OpenAI, messages: object = HELLO, **fields: object) -> openai.BadRequestError:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, messages, **fields)
    return caught.value


def test_chat_model_and_shape(client: openai.OpenAI) -> None:
    answer = chat(client)
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", MODEL, "chatcmpl-")
    message = answer.choices[0].message
    assert (message.role, message.tool_calls, answer.choices[0].logprobs) == ("assistant", None, None)
    assert message.content
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_messages_go_through_the_chat_template(client: openai.OpenAI, http: httpx.Client) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    tokenizer = Tokenizer.load(EMBEDDED_MODEL)
    assert tokenizer is not None
    asked = tokenizer.encode(tokenizer.template.rendered(messages), around=False)
    assert prompt_of(http, messages) == asked
    usage = chat(client, messages).usage
    assert usage is not None
    assert usage.prompt_tokens == len(asked)


def test_text_parts_are_joined_and_a_developer_is_the_system(http: httpx.Client) -> None:
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]
    assert prompt_of(http, [{"role": "user", "content": parts}]) == prompt_of(http, HELLO)
    said = {"content": "Be brief."}
    assert prompt_of(http, [said | {"role": "developer"}]) == prompt_of(http, [said | {"role": "system"}])


def test_an_answer_may_be_sent_again_as_it_came(client: openai.OpenAI, http: httpx.Client) -> None:
    message = chat(client).choices[0].message
    again = [*HELLO, message.model_dump(), {"role": "user", "content": "Again."}]
    plain = [*HELLO, {"role": "assistant", "content": message.content}, {"role": "user", "content": "Again."}]
    assert prompt_of(http, again) == prompt_of(http, plain)


def test_what_a_template_may_read() -> None:
    message = Message(role="assistant", content="x", name="Ada", reasoning_content="hm", refusal="no", annotations=[1])
    thought = {"reasoning_content": "hm", "reasoning": "hm", "thinking": "hm"}
    assert for_template([message]) == [{"role": "assistant", "content": "x", "name": "Ada"} | thought]
    assert for_template([Message(role="assistant", content="x", reasoning="hm")]) == [
        {"role": "assistant", "content": "x"} | thought
    ]
    assert for_template([Message(role="assistant", content="x", reasoning="")]) == [{"role": "assistant", "content": "x"}]
    call = ToolCall(id="1", function=FunctionCall(name="f", arguments="{}"))
    assert "thinking" not in for_template([Message(role="assistant", content="x", reasoning="hm", tool_calls=[call])])[0]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_parts_that_are_no_text_are_refused(client: openai.OpenAI, kind: str) -> None:
    part = {"type": kind, kind: {"url": "data:,"}}
    error = refused(client, [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}])
    assert error.param == "messages[0].content[1]"
    assert kind in error.message


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "audio": {"id": "a"}, "reasoning": "x"}], "messages[0].content"),
        ([{"role": "nobody", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        ([*HELLO, {"content": "x"}], "messages[1].role"),
        ([{"role": "user", "content": "x", "contents": "red"}], "messages[0].contents"),
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
    ],
)
def test_bad_messages_are_named(http: httpx.Client, messages: object, param: str) -> None:
    answer = http.post("/v1/chat/completions", json={"model": MODEL, "messages": messages})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_chat_n(client: openai.OpenAI) -> None:
    choices = chat(client, n=3, temperature=1.5, seed=1).choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert len({choice.message.content for choice in choices}) > 1


def test_chat_max_tokens(client: openai.OpenAI) -> None:
    def output_tokens(**fields: Any) -> int:
        usage = chat(client, extra_body={"ignore_eos": True}, **fields).usage
        assert usage is not None
        return usage.completion_tokens

    assert output_tokens(max_tokens=3) == 3
    assert output_tokens(max_tokens=None, max_completion_tokens=4) == 4
    assert output_tokens(max_tokens=9, max_completion_tokens=5) == 5


def test_chat_logprobs_and_top_logprobs(client: openai.OpenAI) -> None:
    choice = chat(client, logprobs=True, top_logprobs=3, max_tokens=3).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert [one.logprob for one in entry.top_logprobs] == sorted((o.logprob for o in entry.top_logprobs), reverse=True)
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)  # greedy
        assert entry.bytes == list(entry.token.encode())
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    bare = chat(client, logprobs=True, max_tokens=1).choices[0].logprobs
    assert bare is not None
    assert bare.content is not None
    assert bare.content[0].top_logprobs == []
    assert refused(client, top_logprobs=2).param == "top_logprobs"
    assert chat(client, top_logprobs=0, max_tokens=1).choices[0].logprobs is None


def test_chat_logprobs_of_parts_of_characters(client: openai.OpenAI) -> None:
    choice = chat(client, logprobs=True, **forced(UNUSUAL)).choices[0]
    assert choice.message.content == UNUSUAL
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    whole = b"".join(bytes(entry.bytes or ()) for entry in choice.logprobs.content)
    assert whole.decode().removesuffix("<|im_end|>") == UNUSUAL


def test_chat_prompt_logprobs(client: openai.OpenAI) -> None:
    answer = chat(client, extra_body={"prompt_logprobs": 0})
    assert answer.usage is not None
    assert answer.model_extra is not None
    assert len(answer.model_extra["prompt_logprobs"]) == answer.usage.prompt_tokens


def test_chat_stop_and_sampling(client: openai.OpenAI) -> None:
    choice = chat(client, stop=["🙂 an"], **forced(UNUSUAL)).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("你好 ", "stop")
    hot = {"temperature": 2.0, "seed": 9, "max_tokens": 16}
    assert text_of(client, **hot) == text_of(client, **hot)
    assert text_of(client, **hot, top_p=1e-6) == text_of(client, max_tokens=16)


def test_fields_of_no_consequence_are_ignored(client: openai.OpenAI) -> None:
    ignored: dict[str, object] = {
        "metadata": {"a": "b"},
        "prediction": {"type": "content", "content": "hello"},
        "prompt_cache_key": "key",
        "prompt_cache_options": {"mode": "explicit"},
        "prompt_cache_retention": "24h",
        "safety_identifier": "someone",
        "service_tier": "auto",
        "store": True,
        "user": "someone",
        "verbosity": "low",
        "modalities": ["text"],
    }
    assert text_of(client, extra_body=ignored) == text_of(client)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("web_search_options", {}),
        ("moderation", {"model": "m"}),
    ],
)
def test_fields_of_another_world_are_refused(client: openai.OpenAI, field: str, value: object) -> None:
    error = refused(client, extra_body={field: value})
    assert error.param == field
    assert "not supported" in error.message


def test_modalities_other_than_text_are_refused(client: openai.OpenAI) -> None:
    assert (refused(client, modalities=["text", "audio"]).param or "").startswith("modalities")

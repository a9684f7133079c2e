"""What users hand over in Python and in files is read, or refused with what to change."""

import math
from typing import Any

import numpy as np
import pytest

from deploy.doors.python.sources import Source, as_chat, as_token_ids, read_jsonl, read_params, read_source
from deploy.text.content import Conversation, PromptError
from deploy.text.prompts import Terms
from scheduler.protocol.sampling import SamplingParams

CALL = Terms(tenant="of the call", deadline_s=5.0, priority=1)
GREEDY = SamplingParams(temperature=0.0)


def test_every_kind() -> None:
    assert read_source("hello", GREEDY, CALL) == ("hello", GREEDY, CALL)
    assert read_source([5, 6], GREEDY, CALL) == ([5, 6], GREEDY, CALL)
    content, *_ = read_source({"prompt_token_ids": np.array([5, 6])})
    assert isinstance(content, list)
    assert (content, {type(token) for token in content}) == ([5, 6], {int})
    messages = [{"role": "user", "content": "hello"}]
    asked = {"messages": messages, "tools": [{}], "chat_template_kwargs": {"a": 1}}
    assert read_source(asked)[0] == Conversation(messages, [{}], {"a": 1})


def test_a_prompt_s_own_terms_go_before_those_of_the_call() -> None:
    own = {"cache_salt": "me", "tenant": "ann", "deadline_s": 3, "priority": -2}
    assert read_source({"prompt": "a", **own}, GREEDY, CALL) == ("a", GREEDY, Terms("me", "ann", -2, 3.0))
    assert read_source({"prompt": "a", **dict.fromkeys(own)}, GREEDY, CALL) == ("a", GREEDY, CALL)
    assert read_source({"prompt": "a", "deadline_s": math.inf}, GREEDY, CALL)[2].deadline_s == math.inf


def test_a_prompt_s_own_sampling_goes_before_that_of_the_call() -> None:
    _, params, _ = read_source({"prompt": "a", "max_tokens": 3, "logit_bias": {"7": 2}, "stop": "END"}, GREEDY)
    assert params == SamplingParams(temperature=0.0, max_tokens=3, logit_bias={7: 2.0}, stop=("END",))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([1.5], "must be a list of integers"),
        ([True], "must be a list of integers"),
        (b"text", "a prompt is text or token ids, not bytes"),
        ({"prompt": "a", "teneant": "x"}, "unknown key 'teneant': did you mean 'tenant'?"),
        ({"prompt_token_ids": "12"}, "must be a list of integers"),
        ({"prompt": [1]}, "prompt must be a string, not list"),
        (
            {"prompt": "a", "messages": []},
            "give exactly one of prompt, prompt_token_ids, messages; found prompt and messages",
        ),
        ({}, "found none"),
        ({"prompt": "a", "cache_salt": 1}, "cache_salt must be a string, not int"),
        ({"prompt": "a", "tenant": 1}, "tenant must be a string, not int"),
        ({"prompt": "a", "deadline_s": "1"}, "deadline_s must be a number of seconds, not '1'"),
        ({"messages": []}, "at least one entry"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing"),
        ({"messages": ["x"]}, "messages[0]: expected object, got str"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "messages[0].role: invalid enum value 'usr': use one of 'assist"),
        ({"messages": [{"role": "user", "content": "x", "nme": "y"}]}, "unknown field 'messages[0].nme'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content: expected str | array | null, got int"),
        ({"messages": [{"role": "user"}]}, "messages[0] says nothing: give it content"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "say which call it answers, in tool_call_id"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": 5}, "tools: expected array | null, got int"),
        ({"prompt": "a", "tools": []}, "tools goes with messages: leave it out, or give messages instead of prompt"),
        ({"prompt_token_ids": [1], "chat_template_kwargs": {}}, "chat_template_kwargs goes with messages"),
        ({"prompt": "a", "temprature": 1}, "unknown key 'temprature': did you mean 'temperature'?"),
        ({"prompt": "a", "deadline": 1}, "did you mean 'deadline_s'?"),
        ({"prompt": "a", "max_new_tokens": 1}, "did you mean 'max_tokens'?"),
        ({"prompt": "a", "top_p": 2}, "top_p=2.0 is outside (0.0, 1.0]"),
        ({"prompt": "a", "max_tokens": "9"}, "max_tokens: expected `int | null`, got `str`"),
    ],
)
def test_refusals(source: Source, message: str) -> None:
    with pytest.raises(PromptError) as caught:
        read_source(source)
    assert message in str(caught.value)


@pytest.mark.parametrize("fields", [{"stop": 5}, {"logit_bias": 5}, {"stop_token_ids": 5}, {"grammar": "x"}, {"n": "two"}])
def test_parameters_of_any_type_are_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        read_params(SamplingParams(**fields))


def test_hand_made_parameters() -> None:
    assert read_params(SamplingParams(stop="END")).stop == ("END",)  # type: ignore[arg-type]
    assert read_params(SamplingParams(stop=["a"])).stop == ("a",)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="max_tokens: expected `int \\| null`, got `float`"):
        read_params(SamplingParams(max_tokens=1.5))  # type: ignore[arg-type]


def test_jsonl() -> None:
    lines = ['{"prompt": "a", "max_tokens": 3}', "", '{"prompt_token_ids": [1]}']
    assert list(read_jsonl(lines, "file")) == [{"prompt": "a", "max_tokens": 3}, {"prompt_token_ids": [1]}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "not valid JSON: Expecting ',' delimiter at column 15"),
        ('"a"', "expected an object such as"),
    ],
)
def test_bad_jsonl_names_the_line(line: str, message: str) -> None:
    with pytest.raises(PromptError) as caught:
        list(read_jsonl(['{"prompt": "fine"}', line], "prompts.jsonl"))
    assert str(caught.value).startswith("prompts.jsonl, line 2: ")
    assert message in str(caught.value)


def test_texts_as_messages_and_ids() -> None:
    assert as_chat("hi") == {"messages": [{"role": "user", "content": "hi"}]}
    salted = as_chat({"prompt": "hi", "cache_salt": "s"})
    assert salted == {"cache_salt": "s", "messages": [{"role": "user", "content": "hi"}]}
    assert as_token_ids("1, 2 3\n") == [1, 2, 3]
    with pytest.raises(PromptError, match="not token ids: '1 x'"):
        as_token_ids("1 x")
    with pytest.raises(PromptError, match="cannot be put through a chat template"):
        as_chat({"prompt_token_ids": [1]})

"""What the methods answer: prompts of every kind, sampling fields, streams, batches, tokens, models."""

import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from deploy.doors.grpc.writing import merged
from deploy.frontend.service.service import Service
from deploy.proto import manta_pb2 as pb
from scheduler.protocol.sampling import SamplingParams
from tests.deploy.doors.grpc.calls import BLOCK_SIZE, PROMPT, ids, text

Answer = Callable[[Awaitable[Any]], Any]
Generate = Callable[[pb.GenerateRequest], list[pb.GenerateResponse]]

SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}


def test_the_contract_has_every_sampling_field() -> None:
    message = pb.DESCRIPTOR.message_types_by_name["SamplingParams"]
    grammar = {field.name for field in message.oneofs_by_name["grammar"].fields}
    assert {*message.fields_by_name} - grammar == {*SamplingParams.__struct_fields__} - {"grammar"}


def test_a_stream_says_what_the_whole_output_says(generate: Generate, answer: Answer, stub: Any) -> None:
    asked = text(temperature=0.0, max_tokens=24)
    parts = generate(asked)
    assert len(parts) > 1
    assert len({part.request_id for part in parts}) == 1
    assert [part.HasField("usage") for part in parts] == [False] * (len(parts) - 1) + [True]

    whole = merged(parts)
    (choice,) = whole.choices
    assert len(choice.token_ids) == 24 == whole.usage.completion_tokens
    assert choice.text
    assert choice.finish_reason == pb.FINISH_REASON_LENGTH
    assert choice.WhichOneof("stop_reason") is None

    (result,) = answer(stub.GenerateBatch(pb.GenerateBatchRequest(requests=[asked]))).results
    assert result.response.choices == whole.choices
    assert result.response.usage.prompt_tokens == whole.usage.prompt_tokens


def test_the_same_prompt_as_text_and_as_ids(generate: Generate, answer: Answer, stub: Any, service: Service) -> None:
    tokens = answer(stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text=PROMPT), model="tiny")))
    assert tokens.max_model_len == service.model.limits.max_tokens
    by_text, by_ids = (
        merged(generate(request))
        for request in (text(temperature=0.0), ids(*tokens.token_ids, temperature=0.0))
    )  # fmt: skip
    assert by_text.choices == by_ids.choices
    assert by_text.usage.completion_tokens == 16, "the default"


def test_a_chat_goes_through_the_template_and_has_room(generate: Generate, answer: Answer, stub: Any) -> None:
    chat = pb.Prompt(chat=pb.Chat(messages=[pb.Message(role="user", content="hello")]))
    tokens = answer(stub.Tokenize(pb.TokenizeRequest(prompt=chat))).token_ids
    plain = answer(stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="hello")))).token_ids
    assert len(tokens) > len(plain)
    whole = merged(generate(pb.GenerateRequest(prompt=chat, sampling=pb.SamplingParams(min_tokens=20, seed=1, stop=["\n"]))))
    assert whole.usage.prompt_tokens == len(tokens)
    assert whole.usage.completion_tokens > 16, "the default of a text prompt"


def test_cached_tokens_are_told_and_a_salt_keeps_prompts_apart(generate: Generate) -> None:
    prompt = "import asyncio\n" * 20
    first, again = (merged(generate(text(prompt, temperature=0.0))) for _ in range(2))
    assert first.usage.cached_tokens == 0
    assert again.usage.cached_tokens >= BLOCK_SIZE
    assert again.choices == first.choices
    salted = text(prompt, temperature=0.0)
    salted.cache_salt = "mine"
    assert merged(generate(salted)).usage.cached_tokens == 0


def test_choices_logprobs_and_seeds(generate: Generate) -> None:
    asked = text(n=3, seed=11, max_tokens=6, logprobs=2, prompt_logprobs=1)
    whole = merged(generate(asked))
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    for choice in whole.choices:
        assert len(choice.logprobs) == len(choice.token_ids)
        for token, entry in zip(choice.token_ids, choice.logprobs, strict=True):
            assert entry.tokens[0].token_id == token
            assert {1, 2} <= {one.rank for one in entry.tokens}
            assert all(one.logprob <= 0.0 for one in entry.tokens)
    assert len(whole.prompt_logprobs) == whole.usage.prompt_tokens
    assert not whole.prompt_logprobs[0].tokens
    assert all(entry.tokens for entry in whole.prompt_logprobs[1:])
    assert merged(generate(asked)).choices == whole.choices


def test_what_stopped_an_output_is_told(generate: Generate) -> None:
    plain = merged(generate(text(temperature=0.0, max_tokens=12))).choices[0]
    word = plain.text[3:6]
    by_text = merged(generate(text(temperature=0.0, max_tokens=12, stop=[word]))).choices[0]
    assert (by_text.stop, by_text.finish_reason) == (word, pb.FINISH_REASON_STOP)
    assert word not in by_text.text
    by_id = merged(generate(text(temperature=0.0, max_tokens=12, stop_token_ids=[plain.token_ids[4]]))).choices[0]
    assert by_id.stop_token_id == plain.token_ids[4]
    assert by_id.token_ids == plain.token_ids[: list(plain.token_ids).index(plain.token_ids[4]) + 1]


@pytest.mark.parametrize(
    ("grammar", "holds"),
    [
        ({"guided_choice": pb.Texts(texts=["yes", "no"])}, lambda out: out in ("yes", "no")),
        ({"guided_regex": "[0-9]{3}-[a-f]{2}"}, lambda out: re.fullmatch("[0-9]{3}-[a-f]{2}", out)),
        ({"guided_grammar": 'start: "a" "b"'}, lambda out: out == "ab"),
        (
            {"guided_json": json.dumps(SCHEMA)},
            lambda out: isinstance(json.loads(out)["ok"], bool),
        ),
    ],
)
def test_an_output_keeps_to_its_grammar(generate: Generate, grammar: dict[str, Any], holds: Callable[[str], bool]) -> None:
    choice = merged(generate(text(max_tokens=200, seed=3, temperature=0.5, **grammar))).choices[0]
    assert holds(choice.text), choice.text
    assert choice.finish_reason == pb.FINISH_REASON_STOP


def test_a_batch_answers_each_request_for_itself(answer: Answer, stub: Any) -> None:
    good, other = text(temperature=0.0, request_id="first"), text("class A:", max_tokens=5, ignore_eos=True)
    bad = text(temperature=-1.0, request_id="second")
    results = answer(stub.GenerateBatch(pb.GenerateBatchRequest(requests=[good, bad, other]))).results
    assert [result.WhichOneof("outcome") for result in results] == ["response", "error", "response"]
    assert results[0].response.request_id == "first"
    assert results[2].response.usage.completion_tokens == 5
    error = results[1].error
    assert (error.request_id, error.code, error.param) == ("second", 3, "temperature")
    assert "-1" in error.message


def test_models(answer: Answer, stub: Any, service: Service) -> None:
    (model,) = answer(stub.ListModels(pb.ListModelsRequest())).models
    assert (model.name, model.max_model_len) == ("tiny", service.model.limits.max_tokens)
    assert model.created > 0

"""Sampling parameters are valid or they do not exist; the error names the field, the value and the range."""

import math
import pickle
from typing import Any

import msgspec
import pytest

from scheduler.protocol.sampling import MAX_CHOICES, MAX_COUNT, MAX_LOGPROBS, InvalidField, SamplingParams

OUTSIDE: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", MAX_CHOICES + 1),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_k", -1),
    ("top_k", MAX_COUNT + 1),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("min_p", -0.01),
    ("min_p", 1.01),
    ("seed", -1),
    ("seed", 2**63),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 5e-324),
    ("repetition_penalty", 1e30),
    ("repetition_penalty", math.inf),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("min_tokens", -1),
    ("min_tokens", MAX_COUNT + 1),
    ("max_tokens", 0),
    ("max_tokens", MAX_COUNT + 1),
    ("logprobs", -1),
    ("logprobs", MAX_LOGPROBS + 1),
]

LIMITS: list[tuple[str, Any]] = [
    ("n", MAX_CHOICES),
    ("temperature", 0.0),
    ("top_k", 0),
    ("top_p", 1e-9),
    ("min_p", 0.0),
    ("min_p", 1.0),
    ("seed", 0),
    ("seed", 2**63 - 1),
    ("presence_penalty", -2.0),
    ("frequency_penalty", 2.0),
    ("max_tokens", None),
    ("max_tokens", MAX_COUNT),
    ("top_k", MAX_COUNT),
    ("logprobs", 0),
    ("logprobs", MAX_LOGPROBS),
]


@pytest.mark.parametrize(("field", "value"), OUTSIDE)
def test_a_value_outside_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidField, match=rf"^{field}=.*outside [\[(].*\]") as caught:
        SamplingParams(**{field: value})
    assert str(value) in str(caught.value)
    assert caught.value.field == field
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(("field", "value"), LIMITS)
def test_the_limits_themselves_are_legal(field: str, value: Any) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value


def test_biases_are_checked_one_by_one() -> None:
    assert SamplingParams(logit_bias={5: -100.0, 6: 100.0}).logit_bias == {5: -100.0, 6: 100.0}
    with pytest.raises(ValueError, match=r"^logit_bias\[6\]=100\.5"):
        SamplingParams(logit_bias={5: 0.0, 6: 100.5})


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    assert SamplingParams(min_tokens=16, max_tokens=16).min_tokens == 16
    assert SamplingParams(min_tokens=1_000, max_tokens=None).max_tokens is None
    with pytest.raises(ValueError, match=r"min_tokens=17 is above max_tokens=16"):
        SamplingParams(min_tokens=17, max_tokens=16)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^stop:"):
        SamplingParams(stop=("\n", ""))


def test_the_wire_keeps_every_field_and_checks_what_arrives() -> None:
    params = SamplingParams(
        n=2,
        temperature=0.5,
        top_k=3,
        top_p=0.4,
        min_p=0.1,
        seed=9,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias={7: 1.5},
        stop=("end",),
        stop_token_ids=(4,),
        min_tokens=1,
        max_tokens=5,
        ignore_eos=True,
        logprobs=0,
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(SamplingParams())) == {}
    with pytest.raises(msgspec.ValidationError, match="top_p=2"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"top_p": 2.0}), type=SamplingParams)

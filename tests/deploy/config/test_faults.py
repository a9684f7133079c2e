"""Where in a value something is wrong, as msgspec says it."""

from typing import Annotated

import msgspec
import pytest
from msgspec import Meta

from deploy.config.faults import FieldFault, meant, where


class Part(msgspec.Struct, forbid_unknown_fields=True):
    text: str


class Whole(msgspec.Struct, forbid_unknown_fields=True):
    parts: list[Part] = []
    weights: dict[int, Annotated[float, Meta(le=1.0)]] = {}


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("[]", FieldFault("", "Expected `object`, got `array`", None)),
        ('{"part": 1}', FieldFault("part", "Object contains unknown field `part`", "unknown")),
        ('{"a`b": 1}', FieldFault("a`b", "Object contains unknown field `a`b`", "unknown")),
        ('{"parts": [{"text": "", "x": 1}]}', FieldFault("parts[0].x", "Object contains unknown field `x`", "unknown")),
        ('{"parts": [{}]}', FieldFault("parts[0].text", "Object missing required field `text`", "required")),
        ('{"parts": [{"text": 1}]}', FieldFault("parts[0].text", "Expected `str`, got `int`", None)),
        ('{"weights": {"a": 1}}', FieldFault("weights", "Expected `int`, got `str`", None)),
        ('{"weights": {"1": 2}}', FieldFault("weights[...]", "Expected `float` <= 1.0", None)),
    ],
)
def test_the_fault_and_its_path(body: str, fault: FieldFault) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(body, type=Whole)
    assert where(caught.value) == fault


KNOWN = (
    "model", "log_format", "tensor_parallel_size", "custom_all_reduce", "max_model_len", "max_loras", "max_lora_rank", "top_p",
    "top_k", "enable_prefix_caching", "prompt_token_ids", "stop_token_ids", "max_tokens", "temperature", "groups", "port",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "other"),
    [("tempreature", "temperature"), ("topk", "top_k"), ("top-p", "top_p"), ("tpo_p", "top_p"), ("maxTokens", "max_tokens"),
     ("max_token", "max_tokens"), ("prefix_caching", "enable_prefix_caching"), ("tensor_parallel", "tensor_parallel_size"),
     ("max_rank", "max_lora_rank"), ("stop_token", "stop_token_ids"), ("group", "groups"), ("prot", "port")],
)  # fmt: skip
def test_what_was_meant_by_a_slip(name: str, other: str) -> None:
    assert meant(name, KNOWN) == other


@pytest.mark.parametrize(
    "name",
    ["load_format", "config_format", "pipeline_parallel_size", "disable_custom_all_reduce", "max_log_len", "max_cpu_loras",
     "top_a", "return_token_ids", "model_impl", ""],
)  # fmt: skip
def test_a_name_that_only_looks_alike_is_no_slip(name: str) -> None:
    assert meant(name, KNOWN) is None

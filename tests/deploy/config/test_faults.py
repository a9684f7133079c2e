"""Where in a value something is wrong, as msgspec says it."""

from typing import Annotated

import msgspec
import pytest
from msgspec import Meta

from deploy.config.faults import FieldFault, where


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

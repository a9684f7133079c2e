"""Arguments of calls that were cut off, beside the reader that Anthropic's package has for them."""

import json
import random
from typing import Any

import jiter
import pytest

from deploy.doors.anthropic.telling import read_input

LEAVES = ["", "caf\u00e9 \"\\\n", "a, {b: [", 0, 12, -1.5, 1e30, True, False, None]


def value(draw: random.Random, depth: int) -> Any:
    kind = draw.choice(("object", "array", "leaf")) if depth else "leaf"
    if kind == "object":
        return {draw.choice("abcdefgh{,"): value(draw, depth - 1) for _ in range(draw.randrange(4))}
    return [value(draw, depth - 1) for _ in range(draw.randrange(4))] if kind == "array" else draw.choice(LEAVES)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_cut_off_is_read_as_the_package_reads_it(seed: int) -> None:
    draw = random.Random(seed)
    whole = {name: value(draw, 2) for name in "abc"[: draw.randrange(4)]}
    text = json.dumps(whole, ensure_ascii=draw.random() < 0.5, indent=draw.choice((None, 2)))
    assert read_input(text) == whole
    for cut in range(1, len(text)):
        assert read_input(text[:cut]) == jiter.from_json(text[:cut].encode(), partial_mode=True), text[:cut]


@pytest.mark.parametrize("text", ["", "no JSON", "[1]", '"a"', "{" * 100_000, '{"a": }', "{]"])
def test_what_is_no_object_is_nothing(text: str) -> None:
    assert read_input(text) == {}

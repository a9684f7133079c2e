"""Outputs that follow a grammar, over the example checkpoint: each matches, and is the same under every setting."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from cluster.resolve import DEPTH
from deploy import LLM, SamplingParams
from deploy.frontend.outputs import GenerationError, RequestOutput
from scheduler.protocol.sampling import Grammar
from tests.end_to_end.engines import open_llm
from tests.end_to_end.same import require_equal
from tests.end_to_end.waiting import wait_idle

TINY = Path(__file__).parents[3] / "examples" / "tiny"
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["person", "robot"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,4}$"}, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/home"}]},
    },
    "required": ["name", "kind", "age", "tags", "home"],
    "additionalProperties": False,
    "$defs": {
        "home": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["zip"],
            "additionalProperties": False,
        }
    },
}
PATTERN = r"[A-Z][a-z]{2,8}(, [a-z]{1,6}){0,4}\."
CHOICES = ["return", "yes, and no", "名前", '"quoted"']
JSON = Grammar("json_schema", json.dumps(PERSON))
REGEX = Grammar("regex", PATTERN)
CHOICE = Grammar("regex", "|".join(map(re.escape, CHOICES)))
PROMPTS = [
    "def fibonacci(n):",
    "class Person:\n    def __init__(self, name, age):",
    "import json\n\ndef load(path):\n    with open(path) as file:\n        return",
    "# A list of names\n",
]
HOW: list[dict[str, Any]] = [
    {},
    {"top_p": 0.9},
    {"top_k": 20, "min_p": 0.01},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "logprobs": 2},
    {"temperature": 0.0},
]


def require_match(output: RequestOutput, grammar: Grammar) -> None:
    for choice in output.outputs:
        assert choice.finish_reason == "stop", repr(choice.text)
        if grammar is JSON:
            jsonschema.validate(json.loads(choice.text), PERSON)
        elif grammar is REGEX:
            assert re.fullmatch(PATTERN, choice.text)
        else:
            assert choice.text in CHOICES


def run(llm: LLM, work: list[tuple[str, SamplingParams]]) -> list[RequestOutput]:
    return llm.generate([prompt for prompt, _ in work], [params for _, params in work], progress=False)


def test_every_output_matches_its_grammar() -> None:
    """However it is sampled, with everything else in the same steps."""
    ways = [(how, grammar) for how in HOW for grammar in (JSON, REGEX, CHOICE)] * 2
    work = [
        (PROMPTS[seed % len(PROMPTS)], SamplingParams(max_tokens=400, seed=seed, grammar=grammar, n=2, **how))
        for seed, (how, grammar) in enumerate(ways)
    ]
    with open_llm(TINY, block=32, dtype="float32") as llm:
        for output, (_, params) in zip(run(llm, work), work, strict=True):
            assert params.grammar is not None
            require_match(output, params.grammar)


MIXED = [
    (prompt, SamplingParams(max_tokens=60, seed=seed, grammar=grammar, logprobs=1 if seed % 3 == 0 else None))
    for seed, (prompt, grammar) in enumerate(
        (prompt, grammar) for prompt in PROMPTS[:2] for grammar in (JSON, None, REGEX, CHOICE, None)
    )
]


@pytest.fixture(scope="module")
def plain() -> list[RequestOutput]:
    """Every request by itself, so that nothing can depend on what else is in the batch."""
    with open_llm(TINY, block=32, dtype="float64") as llm:
        return [output for one in MIXED for output in run(llm, [one])]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("size", "groups", "depth", "blocks", "budget", "report_steps"),
    [
        (1, 1, 1, 16, 33, 4),
        (2, 2, 1, 12, 64, 1),
        (1, 1, 0, None, 2048, 1),
        (2, 1, 0, None, 64, 1),
        (1, 1, 1, None, 2048, 1),
    ],
    ids=lambda value: str(value),
)
def test_the_same_tokens_under_every_setting(
    size: int,
    groups: int,
    depth: int,
    blocks: int | None,
    budget: int,
    report_steps: int,
    plain: list[RequestOutput],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """blocks: of 16 tokens, where sequences are preempted and start again with the output they had."""
    monkeypatch.setitem(DEPTH, "cpu", depth)
    with open_llm(
        TINY, block=16 if blocks else 32, blocks=blocks, dtype="float64", size=size, groups=groups, report_steps=report_steps,
        max_num_batched_tokens=budget,
    ) as llm:  # fmt: skip
        for output, expected, (prompt, params) in zip(run(llm, MIXED), plain, MIXED, strict=True):
            require_equal(output, expected, f"{prompt!r}, {params}")
        wait_idle(llm)
        assert (llm.stats().preemptions > 0) == (blocks is not None)


def test_a_grammar_that_the_checkpoint_cannot_follow_fails_its_request_only() -> None:
    with open_llm(TINY, dtype="float32") as llm:
        good = ("def f(", SamplingParams(max_tokens=60, seed=1, grammar=REGEX))
        bad = ("def f(", SamplingParams(max_tokens=60, seed=1, grammar=Grammar("regex", "(")))
        with pytest.raises(GenerationError, match="1 of 3 requests failed"):
            run(llm, [good, bad, good])
        require_match(run(llm, [good])[0], REGEX)
        wait_idle(llm)


def test_max_tokens_cuts_an_output_short_of_its_grammar() -> None:
    with open_llm(TINY, dtype="float32") as llm:
        (output,) = run(llm, [("def f(", SamplingParams(max_tokens=5, seed=1, grammar=JSON))])
        assert (output.outputs[0].finish_reason, len(output.outputs[0].token_ids)) == ("length", 5)

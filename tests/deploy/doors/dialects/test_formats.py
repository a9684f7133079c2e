"""Formats become grammars that a worker can follow, or are refused with the field at fault."""

import json
import time
from typing import Any

import pytest
from llguidance import LLTokenizer

from deploy.doors.dialects.tools.formats import (
    MAX_GRAMMAR_BYTES,
    MAX_LARK_LEVELS,
    MAX_NAMES,
    MAX_NESTING,
    MAX_REFERENCES,
    grammar_of,
    schema_grammar,
    validate,
)
from deploy.frontend.errors import Fault, RequestError
from deploy.text.tokenizer import Tokenizer
from scheduler.protocol.sampling import Grammar
from tests.deploy.doors.dialects.conftest import vocabulary
from tests.deploy.doors.dialects.matching import accepts

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
CHOICES = ["yes", "no.", "a|b/c", "\\ [x] #\n☃"]


@pytest.fixture(scope="module")
def words(qwen_folder: Any) -> LLTokenizer:
    return vocabulary(qwen_folder)


def response(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "point", "strict": True, "schema": schema}}


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, ["{}", '{"a": [1, {"b": null}]}'], ["[]", "1", '{"a"']),
        ({"response_format": response(POINT)}, ['{"x": 1}', '{\n  "x": 1\n}'], ['{"x": 1.5}', "{}", '{"x": 1, "y": 2}']),
        ({"guided_json": POINT}, ['{"x": -3}'], ["{}"]),
        ({"guided_json": json.dumps(POINT)}, ['{"x": -3}'], ["{}"]),
        ({"guided_regex": r"[a-z]+(/\d{2})?"}, ["abc", "a/12"], ["", "a/", "a/1", "A"]),
        ({"guided_choice": CHOICES}, CHOICES, ["nox", "a", "y", ""]),
        ({"guided_grammar": 'start: "a" b\nb: "b"+'}, ["ab", "abbb"], ["a", "b"]),
    ],
)  # fmt: skip
def test_what_a_grammar_lets_through(
    fields: dict[str, Any], good: list[str], bad: list[str], words: LLTokenizer, qwen: Tokenizer
) -> None:
    grammar = grammar_of(**fields)
    assert grammar is not None
    validate(grammar, words)
    assert [text for text in good if not accepts(grammar, words, qwen, text)] == []
    assert [text for text in bad if accepts(grammar, words, qwen, text)] == []


def test_any_text() -> None:
    assert grammar_of() is None
    assert grammar_of({"type": "text"}) is None
    assert grammar_of({"type": "text"}, guided_regex="a") == Grammar("regex", "a")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "an object whose type is text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needs the schema"),
        ({"response_format": response(3)}, "response_format.json_schema.schema", "must be a JSON schema"),
        ({"guided_json": "{"}, "guided_json", "not valid JSON"),
        ({"guided_json": "[" * 100_000}, "guided_json", "not valid JSON"),
        ({"guided_json": "3"}, "guided_json", "an object, not int"),
        ({"guided_choice": []}, "guided_choice", "a list of texts"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "not empty"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice", "guided_regex and guided_choice exclude each other"),
        ({"response_format": {"type": "json_object"}, "guided_json": {}}, "guided_json", "exclude each other"),
        ({"guided_grammar": "\n" * 600}, "guided_grammar", f"600 lines and brackets, and {MAX_LARK_LEVELS} are allowed"),
    ],
)
def test_refused_fields(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        grammar_of(**fields)
    assert (caught.value.fault, caught.value.param) == (Fault.INVALID, param)
    assert message in caught.value.message


def test_a_grammar_is_bounded_in_bytes() -> None:
    with pytest.raises(RequestError, match=f"{MAX_GRAMMAR_BYTES} are allowed") as caught:
        grammar_of(guided_regex="é" * (MAX_GRAMMAR_BYTES // 2 + 1))
    assert (caught.value.fault, caught.value.param) == (Fault.TOO_LARGE, "guided_regex")


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("regex", "a(?=b)"), "look-around"),
        (Grammar("lark", "start: nowhere"), "nowhere"),
        (Grammar("lark", "start: <|no_such_token|>"), "no_such_token"),
        (Grammar("json_schema", '{"type": "objct"}'), "objct"),
        (Grammar("json_schema", '{"not": {}}'), "not"),
        (Grammar("json_schema", '{"$ref": "#/$defs/none"}'), "none"),
        (Grammar("lark", "start: " + "x" * 100_000 + "?("), "lark: "),
    ],
)
def test_what_cannot_be_compiled_is_refused_at_the_door(grammar: Grammar, message: str, words: LLTokenizer) -> None:
    with pytest.raises(RequestError) as caught:
        validate(grammar, words, "response_format")
    error = caught.value
    assert (error.fault, error.code, error.param) == (Fault.UNPROCESSABLE, "invalid_grammar", "response_format")
    assert message in error.message
    assert len(error.message) < 1000


def chain(length: int, inner: int) -> dict[str, Any]:
    """Definitions that point to one another in a row, each of so many levels."""
    definitions: dict[str, Any] = {}
    for position in range(length):
        link: dict[str, Any] = {"$ref": f"#/$defs/{position + 1}"}
        for _ in range(inner):
            link = {"type": "array", "items": link}
        definitions[str(position)] = link
    return {"$ref": "#/$defs/0", "$defs": definitions | {str(length): {"type": "string"}}}


@pytest.mark.parametrize("inner", [1, 5, 25])
def test_the_deepest_schema_that_is_let_in_can_be_compiled(inner: int, words: LLTokenizer) -> None:
    """One that is a few times deeper would overflow the compiler's stack and end the process."""
    longest = (MAX_NESTING - inner - 5) // (inner + 1)
    validate(schema_grammar(chain(longest, inner), "guided_json"), words)
    with pytest.raises(RequestError, match=f"{MAX_NESTING} are allowed: flatten it") as caught:
        schema_grammar(chain(longest + 5, inner), "guided_json")
    assert caught.value.param == "guided_json"


def test_references_are_counted_wherever_they_point() -> None:
    loop = {"$defs": {"a/b": {"items": {"$ref": "#/$defs/a~1b"}}}, "anyOf": [{"$ref": "#/$defs/a~1b"}, {"$ref": "#/anyOf/0"}]}
    assert schema_grammar(loop, "guided_json").kind == "json_schema"
    elsewhere = {"allOf": [{"$ref": f"#anchor{number}"} for number in range(MAX_NESTING)]}
    with pytest.raises(RequestError, match="flatten it"):
        schema_grammar(elsewhere, "guided_json")


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": {"$ref": "#"}},
        {"guided_json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
        {"guided_json": {"allOf": [{"$ref": "#"}]}},
        {"guided_regex": r"[^\s\S]"},
        {"guided_grammar": "start: a\na: b\nb: a"},
    ],
    ids=str,
)
def test_what_no_text_can_match_is_refused_at_the_door(fields: dict[str, Any], words: LLTokenizer) -> None:
    """A worker would find that nothing may begin, which is nobody's fault but the grammar's."""
    grammar = grammar_of(**fields)
    assert grammar is not None
    with pytest.raises(RequestError) as refused:
        validate(grammar, words, "the field")
    assert (refused.value.fault, refused.value.param) == (Fault.UNPROCESSABLE, "the field")


def alternatives(rules: int) -> str:
    """Each rule may be any other: what is slowest to compile for its length."""
    names = "|".join(f"a{rule}" for rule in range(rules))
    return "\n".join(["start: a0", *(f'a{rule}: {names}|"{rule}"' for rule in range(rules))])


def test_a_grammar_that_would_take_a_minute_to_compile_is_refused_before(words: LLTokenizer) -> None:
    assert len(alternatives(150)) < MAX_GRAMMAR_BYTES
    with pytest.raises(RequestError, match=f"names and literals, and {MAX_NAMES} are allowed"):
        grammar_of(guided_grammar=alternatives(150))
    schema = {"$defs": {f"a{at}": {"anyOf": [{"$ref": f"#/$defs/a{to}"} for to in range(60)]} for at in range(60)}}
    with pytest.raises(RequestError, match=f"3600 references, and {MAX_REFERENCES} are allowed"):
        grammar_of(guided_json=schema)
    largest = grammar_of(guided_grammar=alternatives(61))
    assert largest is not None
    began_s = time.process_time()
    validate(largest, words)
    assert time.process_time() - began_s < 10.0

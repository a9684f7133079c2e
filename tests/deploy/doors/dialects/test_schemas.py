"""Schemas as pydantic and zod write them are followed as far as a grammar can, and what cannot is said, or refused."""

import datetime
import enum
import ipaddress
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest
from llguidance import LLTokenizer

from deploy.doors.dialects.tools.families.objects import HERMES
from deploy.doors.dialects.tools.formats import grammar_of, validate
from deploy.doors.dialects.tools.tools import ToolDialect, Tools, read_tools
from deploy.doors.warnings import HEADER, MAX_CHARACTERS, Warnings
from deploy.frontend.errors import Fault, RequestError
from deploy.text.tokenizer import Tokenizer
from scheduler.protocol.sampling import Grammar
from tests.deploy.doors.dialects.conftest import vocabulary
from tests.deploy.doors.dialects.matching import accepts

UUID4, UUID1 = "0b1f6f0e-9c3e-4f0a-8d5c-1a2b3c4d5e6f", "0b1f6f0e-9c3e-1f0a-8d5c-1a2b3c4d5e6f"
EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
STRING, NUMBER = {"type": "string"}, {"type": "number"}


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]


def of(kind: Any) -> dict[str, Any]:
    """As pydantic writes it."""
    return pydantic.TypeAdapter(kind).json_schema()


Sample = tuple[dict[str, Any], list[Any], list[Any], list[str]]

ENFORCED: dict[str, Sample] = {
    "UUID4": (of(pydantic.UUID4), [UUID4], [UUID1, "x"], []),
    "dict of Literal": (of(dict[Literal["a", "b"], int]), [{"a": 1}, {"a": 1, "b": 2}, {}], [{"c": 1}, {"a": "x"}], []),
    "dict of an enum": (of(dict[Colour, int]), [{"red": 1}], [{"green": 1}], []),
    "dict of a pattern": (
        of(dict[Annotated[str, pydantic.Field(pattern="^x[0-9]$")], int]), [{"x1": 1, "x2": 2}], [{"x1": "a"}], []
    ),
    "zod: record(string, number)": (
        {"type": "object", "propertyNames": STRING, "additionalProperties": NUMBER}, [{"any": 1.5}, {}], [{"a": "b"}], []
    ),
    "zod: record(enum, number)": (
        {"type": "object", "propertyNames": STRING | {"enum": ["a", "b"]}, "additionalProperties": NUMBER,
         "required": ["a", "b"]},
        [{"a": 1, "b": 2}], [{"a": 1}, {"a": 1, "b": 2, "c": 3}], [],
    ),
    "zod: record(regex, number)": (
        {"type": "object", "propertyNames": STRING | {"pattern": "^k"}, "additionalProperties": NUMBER},
        [{"k1": 1}], [{"a": 1}], [],
    ),
    "zod: never": ({"anyOf": [{"not": {}}, STRING]}, ["a"], [1, {}], []),
    "zod: iso.time": (STRING | {"format": "time", "pattern": r"^\d\d:\d\d:\d\d$"}, ["12:30:00"], ["12:30", "noon"], []),
    "zod: uuid": (STRING | {"format": "uuid", "pattern": "^[0-9a-f-]{36}$"}, [UUID4], ["x"], []),
    "zod: int": ({"type": "integer", "minimum": -(2**53 - 1), "maximum": 2**53 - 1}, [7], [7.5, "7"], []),
    "zod: tuple": (
        {"type": "array", "prefixItems": [STRING, NUMBER], "items": False}, [["a", 1]], [["a", 1, 2], [1, "a"]], []
    ),
    "members called like keys": (
        {"type": "object", "properties": {"propertyNames": STRING, "not": {"not": {}}}, "additionalProperties": False},
        [{"propertyNames": "x"}], [{"not": 1}, {"propertyNames": 1}], [],
    ),
    "names by a pattern that is defined elsewhere": (
        {"type": "object", "propertyNames": {"$ref": "#/$defs/k"}, "additionalProperties": NUMBER,
         "$defs": {"k": {"type": "string", "pattern": "^k"}}},
        [{"k1": 1}], [{"a": 1}], [],
    ),
    "constants are no schemas": ({"enum": [{"not": {}, "pattern": "(?=a)"}]}, [{"not": {}, "pattern": "(?=a)"}], [False], []),
}  # fmt: skip

SAID: dict[str, Sample] = {
    "Path": (of(Path), ["/a/b"], [1], ["path"]),
    "bytes": (of(bytes), ["abc"], [1], ["binary"]),
    "Base64Bytes": (of(pydantic.Base64Bytes), ["YWJj"], [1], ["base64"]),
    "SecretStr": (of(pydantic.SecretStr), ["abc"], [1], ["password"]),
    "IPv4Network": (of(ipaddress.IPv4Network), ["10.0.0.0/8"], [1], ["ipv4network"]),
    "regular expression": (of(re.Pattern), ["a+"], [1], ["regex"]),
    "set": (of(set[int]), [[1, 2], [1, 1]], [["a"]], ["uniqueItems"]),
    "dict of dates": (of(dict[datetime.date, int]), [{"2026-11-30": 1}], [{"a": "b"}], ["propertyNames"]),
    "zod: email": (STRING | {"format": "email", "pattern": EMAIL}, ["ada@example.org"], ["ada"], ["looks around"]),
    "zod: base64": (STRING | {"format": "base64", "contentEncoding": "base64"}, ["YWJj"], [1], ["base64"]),
    "zod: cuid": (STRING | {"format": "cuid", "pattern": "^[cC][^\\s-]{8,}$"}, ["c12345678"], ["x"], ["cuid"]),
    "a pattern that refers back": (STRING | {"pattern": r"^(a|b)\1$"}, ["aa", "ab"], [1], ["refers back"]),
    "names that look ahead": (
        {"type": "object", "patternProperties": {"^(?!_)": NUMBER}, "additionalProperties": False},
        [{"a": 1}, {"_": "x"}], [1], ["looks around"],
    ),
    "names that are named by themselves": (
        {"type": "object", "propertyNames": {"$ref": "#"}, "additionalProperties": NUMBER}, [{"a": 1}], [{"a": "x"}],
        ["propertyNames"],
    ),
    "overlapping oneOf": ({"oneOf": [{"type": "integer"}, NUMBER]}, [1, 1.5], ["a"], ["oneOf"]),
    "if, then": (
        {"type": "object", "properties": {"a": NUMBER}, "if": {"required": ["a"]}, "then": {"required": ["b"]}},
        [{"a": 1}], [{"a": "x"}], ["if", "then"],
    ),
    "two at once": (
        {"type": "object", "properties": {"p": of(Path), "s": of(set[int])}}, [{"p": "x", "s": []}], [{"p": 1}],
        ["path", "uniqueItems"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def words(qwen_folder: Path) -> LLTokenizer:
    return vocabulary(qwen_folder)


def response(schema: Any, strict: bool | None = None) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}


def compiled(schema: Any, words: LLTokenizer, strict: bool | None = None) -> tuple[Grammar, str]:
    """The grammar, and all that was said of it."""
    warnings = Warnings()
    grammar = grammar_of(response(schema, strict), warnings=warnings)
    assert grammar is not None
    return grammar, " ".join([*warnings, *validate(grammar, words)])


@pytest.mark.parametrize("sample", [*ENFORCED.values(), *SAID.values()], ids=[*ENFORCED, *SAID])
@pytest.mark.parametrize("strict", [None, False])
def test_schemas_of_peoples_tools(sample: Sample, strict: bool | None, words: LLTokenizer, qwen: Tokenizer) -> None:
    schema, good, bad, said = sample
    given = json.dumps(schema)
    grammar, told = compiled(schema, words, strict)
    assert [value for value in good if not accepts(grammar, words, qwen, json.dumps(value))] == []
    assert [value for value in bad if accepts(grammar, words, qwen, json.dumps(value))] == []
    assert [word for word in said if word not in told] == []
    assert bool(told) == bool(said)
    assert json.dumps(schema) == given, "what the client wrote is changed"


@pytest.mark.parametrize("sample", ENFORCED.values(), ids=[*ENFORCED])
def test_what_can_be_enforced_may_be_strict(sample: Sample, words: LLTokenizer, qwen: Tokenizer) -> None:
    schema, good, bad, _ = sample
    grammar, told = compiled(schema, words, strict=True)
    assert not told
    assert [value for value in good if not accepts(grammar, words, qwen, json.dumps(value))] == []
    assert [value for value in bad if accepts(grammar, words, qwen, json.dumps(value))] == []


@pytest.mark.parametrize("schema", [sample[0] for sample in SAID.values()], ids=[*SAID])
def test_what_cannot_be_enforced_is_refused_if_it_must_be(schema: Any, words: LLTokenizer) -> None:
    with pytest.raises(RequestError) as caught:
        compiled(schema, words, strict=True)
    assert (caught.value.fault, caught.value.code) == (Fault.UNPROCESSABLE, "invalid_grammar")
    grammar = grammar_of(guided_json=schema)  # where nobody would hear a warning
    assert grammar is not None
    with pytest.raises(RequestError):
        validate(grammar, words)


def test_a_model_of_many_kinds(words: LLTokenizer, qwen: Tokenizer) -> None:
    class Order(pydantic.BaseModel):
        id: pydantic.UUID4
        file: Path
        tags: set[str]
        prices: dict[Literal["net", "gross"], float]
        pet: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]
        note: str | None = None

    grammar, told = compiled(Order.model_json_schema(), words)
    order = {"id": UUID4, "file": "/x", "tags": ["a"], "prices": {"net": 1.5}, "pet": {"kind": "dog"}, "note": None}
    assert accepts(grammar, words, qwen, json.dumps(order))
    assert not accepts(grammar, words, qwen, json.dumps(order | {"prices": {"tax": 1}}))
    assert "path" in told
    assert "uniqueItems" in told


NO_SCHEMAS: list[dict[str, Any]] = [
    {"type": "objct"}, {"$ref": "#/$defs/none"}, {"enum": []}, {"type": "string", "pattern": "("},
    {"propertyNames": {"enum": 3}, "properties": 3}, {"patternProperties": 3}, {"anyOf": 3}, {"pattern": 3},
]  # fmt: skip


@pytest.mark.parametrize("schema", NO_SCHEMAS)
def test_what_is_no_schema_is_refused_all_the_same(schema: Any, words: LLTokenizer) -> None:
    with pytest.raises(RequestError) as caught:
        compiled(schema, words)
    assert caught.value.fault is Fault.UNPROCESSABLE


def tools(strict: bool, choice: Any = "required") -> Tools:
    parameters = {"type": "object", "properties": {"p": of(Path), "at": STRING | {"pattern": EMAIL}}}
    function = {"name": "f", "strict": strict, "parameters": parameters}
    dialect = ToolDialect(HERMES, {"<tool_call>": 315, "</tool_call>": 316})
    read = read_tools([{"type": "function", "function": function}], choice, None, dialect)
    assert read is not None
    return read


def test_the_same_holds_for_tools(words: LLTokenizer, qwen: Tokenizer) -> None:
    warnings = Warnings()
    grammar = tools(strict=False).grammar(None, warnings)
    assert grammar is not None
    told = " ".join([*warnings, *validate(grammar, words)])
    assert "looks around" in told
    assert "Unknown format: path" in told
    assert accepts(grammar, words, qwen, '<tool_call>\n{"name": "f", "arguments": {"p": "/x"}}\n</tool_call>')
    strict = tools(strict=True).grammar(None, Warnings())
    assert strict is not None
    with pytest.raises(RequestError):
        validate(strict, words)
    answer = grammar_of(response({"type": "array", "uniqueItems": True}), warnings=Warnings())
    beside = tools(strict=False, choice="auto").grammar(answer, Warnings())
    assert beside is not None
    assert "uniqueItems" in " ".join(validate(beside, words))


def test_warnings_fit_into_a_header() -> None:
    warnings = Warnings()
    assert warnings.headers() == {}
    warnings.add('a "name"\r\nof é')
    warnings.add('a "name"\r\nof é')
    assert warnings.headers() == {HEADER: "299 manta \"a 'name'\\r\\nof \\xe9\""}
    for number in range(100):
        warnings.add(f"{number}\U0001f600" * 1000)
    assert len(warnings.headers()[HEADER]) < 10 * (MAX_CHARACTERS + 20)

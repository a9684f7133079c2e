"""A call that must be made is written in the syntax of the family, and its arguments by the schema."""

from pathlib import Path
from typing import Any

import pytest

from deploy.doors.dialects.tools.families.known import TOOL_FORMATS
from deploy.doors.dialects.tools.families.values import kinds_of
from deploy.doors.dialects.tools.formats import validate
from deploy.doors.dialects.tools.tools import ToolDialect, Tools, read_tools
from deploy.doors.warnings import Warnings
from deploy.frontend.errors import RequestError
from scheduler.protocol.sampling import Grammar
from tests.deploy.doors.dialects.conftest import MakeCheckpoint, opened, vocabulary
from tests.deploy.doors.dialects.matching import accepts
from tests.deploy.doors.dialects.tool_calls import (
    ARGUMENT,
    GLM,
    ONE,
    PARAMETER,
    QWEN3,
    TEMPLATES,
    TOOLS,
    TWO,
    called,
    parse,
)  # fmt: skip
from workers.sampling.grammar import compile_grammar


@pytest.fixture(scope="module", params=[True, False], ids=["tokens", "text"])
def folders(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> dict[str, Path]:
    """A checkpoint of each family, whose marks are tokens of the vocabulary or are not."""
    return {
        family: make_checkpoint(TEMPLATES[family], form.marks if request.param else ())
        for family, form in TOOL_FORMATS.items()
    }


def offered(family: str, folder: Path, choice: Any, parallel: bool = True) -> Tools:
    dialect = ToolDialect.of(opened(folder), family)
    assert dialect is not None
    tools = read_tools(TOOLS, choice, parallel, dialect)
    assert tools is not None
    return tools


@pytest.mark.few(6)
@pytest.mark.parametrize("family", TOOL_FORMATS)
def test_a_forced_call_follows_the_syntax_of_the_family(family: str, folders: dict[str, Path]) -> None:
    folder, words = folders[family], vocabulary(folders[family])
    named = {"type": "function", "function": {"name": "get_weather"}}

    def allowed(tools: Tools, text: str) -> bool:
        grammar = tools.grammar(None, Warnings())
        assert grammar is not None
        validate(grammar, words, "tools")
        return accepts(grammar, words, opened(folder), text)

    required = offered(family, folder, "required")
    assert allowed(required, ONE[family])
    assert not allowed(required, "Paris")
    assert not allowed(required, ONE[family].replace("get_weather", "get_rain"))
    assert not allowed(required, ONE[family].replace("days", "city_"))
    assert not allowed(required, ONE[family].replace("3", '"x"'))
    assert allowed(offered(family, folder, named), ONE[family])
    if family in TWO:
        assert allowed(required, TWO[family])
        assert not allowed(offered(family, folder, "required", parallel=False), TWO[family])
        assert not allowed(offered(family, folder, named), TWO[family].replace("get_time", "get_weather"))


def written(family: str, arguments: dict[str, Any]) -> str:
    """A call of get_weather."""
    if family == "pythonic":
        return f"[get_weather({', '.join(f'{key}={value}' for key, value in arguments.items())})]"
    call, argument = (QWEN3, PARAMETER) if family == "qwen3_coder" else (GLM, ARGUMENT)
    return call.format("get_weather", "".join(argument.format(*item) for item in arguments.items()))


def grammar_of(family: str, parameters: Any, strict: bool = False) -> tuple[Grammar, list[str]]:
    """Of a call that must be made, and what was said of it."""
    warnings, function = Warnings(), {"name": "f", "parameters": parameters, "strict": strict}
    tools = read_tools([{"type": "function", "function": function}], "required", True, ToolDialect(TOOL_FORMATS[family]))
    assert tools is not None
    grammar = tools.grammar(None, warnings)
    assert grammar is not None
    return grammar, [*warnings]


@pytest.mark.parametrize("family", ["qwen3_coder", "glm45"])
def test_what_a_text_between_tags_is_not_held_to_is_said(family: str) -> None:
    properties = {"a": {"type": "string", "pattern": "^x"}, "b": {"type": "integer", "minimum": 3}}
    schema = {"type": "object", "properties": properties}
    assert grammar_of(family, schema)[1] == ["tools: f: not enforced: pattern of a"]
    with pytest.raises(RequestError, match="pattern of a, and it is strict"):
        grammar_of(family, schema, strict=True)
    assert grammar_of(family, {"type": "object", "minProperties": 1})[1] == ["tools: f: not enforced: minProperties"]


def test_kinds_are_found_behind_each_reference_once() -> None:
    """Sixty choices that are all of sixty choices again: following each would take forever."""
    names = [f"k{number}" for number in range(60)]
    choices = {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in names]}
    root = {"properties": {"a": choices}, "$defs": dict.fromkeys(names, choices) | {"k7": {"type": "integer"}}}
    assert kinds_of({"$ref": "#/$defs/k7"}, root) == {"integer"}
    assert "string" in kinds_of(choices, root)
    both = {"allOf": [{"type": ["string", "null"]}, {"enum": ["a", 1]}]}
    assert kinds_of(both, both) == {"string"}
    assert kinds_of({"const": None}, {}) == {"null"}


def test_listed_strings_may_be_empty_or_none_of_the_type(make_checkpoint: MakeCheckpoint) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "enum": ["", "x", 1]}, "b": {"const": "y"}}}
    grammar, said = grammar_of("qwen3_coder", parameters)
    folder = make_checkpoint(TEMPLATES["qwen3_coder"])
    words = vocabulary(folder)
    validate(grammar, words)
    assert said == []
    texts = [PARAMETER.format("a", ""), PARAMETER.format("a", "x") + PARAMETER.format("b", "y"), PARAMETER.format("a", "1"), ""]
    allowed = [accepts(grammar, words, opened(folder), QWEN3.format("f", text)) for text in texts]
    assert allowed == [True, True, False, True]


@pytest.mark.parametrize("family", ["qwen3_coder", "glm45", "pythonic"])
@pytest.mark.parametrize(
    "schema",
    [
        {"properties": 3}, {"properties": {"a": 3}, "required": 3}, {"properties": {"a": {"type": [[]], "enum": 3}}},
        {"properties": {"a": {"allOf": 3, "anyOf": 3}}}, {"$ref": "#"}, {"$ref": "#/$defs/x"},
        {"$ref": "#/$defs/x", "$defs": {"x": 3}},
    ],
)  # fmt: skip
def test_schemas_that_make_no_sense_do_no_harm(family: str, schema: Any) -> None:
    grammar_of(family, schema)
    text = written(family, {"a": "1"}).replace("get_weather", "f")
    assert called(parse(family, [text], schemas={"f": schema})[0])[0][0] == "f"


@pytest.mark.parametrize("family", ["qwen3_coder", "glm45", "pythonic"])
def test_arguments_that_are_no_json_are_bound_by_the_schema_too(family: str, folders: dict[str, Path]) -> None:
    quote = '"' if family == "pythonic" else ""
    city, unit = f"{quote}New York <3{quote}", f"{quote}C{quote}"
    good: list[dict[str, Any]] = [
        {"city": city}, {"city": city, "metric": "True" if family == "pythonic" else "true"}, {"city": city, "unit": unit},
        {"city": city, "days": 3, "at": '{"x": 1.5}'}, {"city": city, "note": "null"},
        {"city": city, "days": 3, "metric": "False" if family == "pythonic" else "false", "unit": unit},
    ]  # fmt: skip
    bad: list[dict[str, Any]] = [
        {}, {"unit": unit}, {"city": city, "metric": 3}, {"city": city, "unit": city}, {"city": city, "at": '{"y": 1}'},
    ]  # fmt: skip
    folder = folders[family]
    grammar = offered(family, folder, "required").grammar(None, Warnings())
    assert grammar is not None
    words = vocabulary(folder)
    validate(grammar, words, "tools")
    allowed = {text: accepts(grammar, words, opened(folder), text) for text in (written(family, each) for each in good + bad)}
    assert allowed == {written(family, each): each in good for each in good + bad}
    for each in good:
        ((name, arguments),) = called(parse(family, [written(family, each)])[0])
        assert (name, arguments.keys()) == ("get_weather", each.keys())
        assert arguments["city"] == "New York <3"


def test_a_mark_that_is_a_token_cannot_be_spelled(make_checkpoint: MakeCheckpoint) -> None:
    """The reader of the text would take it for the mark, and the grammar would not."""
    form = TOOL_FORMATS["glm45"]
    folder = make_checkpoint(TEMPLATES["glm45"], form.marks)
    tokenizer = opened(folder)
    grammar = offered("glm45", folder, "required").grammar(None, Warnings())
    assert grammar is not None
    begin, _, _ = GLM.format("get_weather", ARGUMENT.format("city", "x")).partition("</arg_value>")
    for spelled, allowed in ((("</arg_", "value"), True), (("</arg_", "value>"), False)):
        tokens = [*tokenizer.encode(begin), *(token for part in spelled for token in tokenizer.encode(part))]
        assert tokenizer.token_id("</arg_value>") not in tokens
        matcher = compile_grammar(grammar, vocabulary(folder))
        assert (matcher.try_consume_tokens(tokens) == len(tokens)) is allowed

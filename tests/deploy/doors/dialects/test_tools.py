"""Tools are valid or refused, and a forced call can be nothing but a call of one of them."""

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from deploy.config import serve as serve_config
from deploy.config.serve import ServeConfig
from deploy.doors.dialects.tools.events import CallArguments, CallBegin
from deploy.doors.dialects.tools.families.known import TOOL_FORMATS
from deploy.doors.dialects.tools.families.objects import HERMES, LLAMA3_JSON, ObjectFormat
from deploy.doors.dialects.tools.formats import grammar_of, validate
from deploy.doors.dialects.tools.tools import AUTO, NONE, ToolDialect, Tools, read_tools
from deploy.doors.warnings import Warnings
from deploy.frontend.errors import Fault, RequestError
from deploy.text.tokenizer import Tokenizer
from scheduler.protocol.sampling import Grammar
from tests.deploy.doors.dialects.conftest import LLAMA_TEMPLATE, QWEN_TEMPLATE, TOOL_TOKENS, MakeCheckpoint, opened, vocabulary
from tests.deploy.doors.dialects.matching import accepts

MARKED = {"<tool_call>": 315, "</tool_call>": 316}
DIALECTS = [ToolDialect(HERMES, MARKED), ToolDialect(HERMES), ToolDialect(LLAMA3_JSON)]

WEATHER = {
    "type": "object",
    "properties": {"place": {"$ref": "#/$defs/place"}, "unit": {"enum": ["C", "F"]}},
    "required": ["place"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
}
PARIS = {"place": {"city": 'Pa"}ris'}, "unit": "C"}


def function(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    described = {"name": name, "description": f"does {name}", **more}
    return {"type": "function", "function": described | ({} if parameters is None else {"parameters": parameters})}


TOOLS = [function("get_weather", WEATHER, strict=True), function("get"), function("log", {"properties": {"text": {}}})]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def bound(choice: Any, dialect: ToolDialect | None = DIALECTS[0], **more: Any) -> Grammar | None:
    """The grammar of what is offered."""
    return read(choice, dialect, **more).grammar(None, Warnings())


def read(
    choice: Any = "auto", dialect: ToolDialect | None = DIALECTS[0], tools: Any = TOOLS, parallel: bool | None = None
) -> Tools:
    offered = read_tools(tools, choice, parallel, dialect)
    assert offered is not None
    return offered


def written(dialect: ToolDialect, *calls: tuple[str, Any]) -> str:
    """Calls as a model of this dialect writes them."""
    form = dialect.form
    assert isinstance(form, ObjectFormat)
    bodies = [json.dumps({"name": name, form.key: arguments}) for name, arguments in calls]
    return str(form.join).join(f"{form.begin}{body}{form.end}" for body in bodies)


@pytest.mark.parametrize("choice", [None, "auto", "none", "required", named("get")])
def test_choices(choice: Any) -> None:
    offered = read_tools(TOOLS, choice, None, DIALECTS[0])
    if choice == "none":
        assert offered is None
        return
    assert offered is not None
    assert offered.specs == TOOLS
    assert offered.forced == {"required": ("get_weather", "get", "log"), "auto": (), None: ()}.get(
        choice if isinstance(choice, str | None) else "", ("get",)
    )
    assert (offered.grammar(None, Warnings()) is None) == (not offered.forced)


@pytest.mark.parametrize("tools", [None, []])
def test_no_tools(tools: Any) -> None:
    assert read_tools(tools, "auto", True, None) is None
    with pytest.raises(RequestError, match="no tools are given"):
        read_tools(tools, "required", None, None)


@pytest.mark.parametrize(
    ("tools", "choice", "param", "message"),
    [
        ({}, "required", "tool_choice", "no tools are given"),
        ([function(f"f{number}") for number in range(129)], None, "tools", "at most 128"),
        ([{"type": "retrieval"}], None, "tools[0]", "not a function"),
        ([TOOLS[0], {"type": "function", "function": {}}], None, "tools[1]", "not a function"),
        ([function("get weather")], None, "tools[0].function.name", "no name of a function"),
        ([function("x" * 65)], None, "tools[0].function.name", "1 to 64 letters"),
        ([function("a\n")], None, "tools[0].function.name", "1 to 64 letters"),
        ([function("a"), function("a")], None, "tools", "tools[1]: there is a function 'a' already"),
        ([function("a", "x")], None, "tools[0].function.parameters", "a JSON schema of type object"),
        ([function("a", {"type": "array"})], None, "tools[0].function.parameters", "of type object"),
        (TOOLS, "sometimes", "tool_choice", "none, auto, required or"),
        (TOOLS, {"type": "function"}, "tool_choice", "none, auto, required or"),
        (TOOLS, named("nowhere"), "tool_choice", "'nowhere', which is not among the tools"),
    ],
)
def test_refused(tools: Any, choice: Any, param: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_tools(tools, choice, None, DIALECTS[0])
    assert (caught.value.fault, caught.value.param) == (Fault.INVALID, param)
    assert message in caught.value.message


def test_a_checkpoint_without_a_known_format() -> None:
    with pytest.raises(RequestError, match="shows no format of tool calls that is known here"):
        read_tools(TOOLS, "auto", None, None)
    assert read_tools(TOOLS, "none", None, None) is None


@pytest.fixture(scope="module", params=DIALECTS, ids=["hermes tokens", "hermes text", "llama"])
def calling(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> tuple[ToolDialect, Path]:
    dialect: ToolDialect = request.param
    template = LLAMA_TEMPLATE if dialect.form is LLAMA3_JSON else QWEN_TEMPLATE
    folder = make_checkpoint(template, TOOL_TOKENS if dialect.tokens else ())
    assert ToolDialect.of(opened(folder)) == dialect
    return dialect, folder


def allowed(grammar: Grammar | None, folder: Path, outputs: list[str]) -> list[bool]:
    assert grammar is not None
    words = vocabulary(folder)
    validate(grammar, words, "tools")
    return [accepts(grammar, words, opened(folder), output) for output in outputs]


def test_a_required_call_is_one_of_the_functions_with_its_arguments(calling: tuple[ToolDialect, Path]) -> None:
    dialect, folder = calling
    good = [
        written(dialect, ("get_weather", PARIS)),
        written(dialect, ("get", {})),
        written(dialect, ("log", {"text": [1, None], "more": "é"})).replace("\\u00e9", "é"),
        written(dialect, ("get", {}), ("get_weather", PARIS), ("get", {})),
    ]
    bad = [
        "Sure, here it is",
        written(dialect, ("get", {"a": 1})),
        written(dialect, ("get_weather", {"place": "Paris"})),
        written(dialect, ("get_wea", {})),
        good[0] + "!",
    ]
    assert allowed(bound("required", dialect), folder, good + bad) == [True] * len(good) + [False] * len(bad)


def test_a_named_call(calling: tuple[ToolDialect, Path]) -> None:
    dialect, folder = calling
    outputs = [written(dialect, ("get", {})), written(dialect, ("log", {})), written(dialect, ("get", {}), ("get", {}))]
    assert allowed(bound(named("get"), dialect), folder, outputs) == [True, False, False]
    assert allowed(bound(named("get"), dialect, parallel=False), folder, outputs) == [True, False, False]


def test_what_a_grammar_allows_the_parser_reads(calling: tuple[ToolDialect, Path]) -> None:
    dialect, _ = calling
    numbers = count()
    parser = read("required", dialect).parser(lambda: f"call_{next(numbers)}")
    assert parser is not None
    output = written(dialect, ("get_weather", PARIS), ("get", {}))
    assert [*parser.push(output), *parser.flush()] == [
        CallBegin(0, "call_0", "get_weather"),
        CallArguments(0, json.dumps(PARIS)),
        CallBegin(1, "call_1", "get"),
        CallArguments(1, "{}"),
    ]


def test_calls_beside_an_answer_with_a_form(calling: tuple[ToolDialect, Path]) -> None:
    dialect, folder = calling
    answer = grammar_of(guided_json={"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})
    assert answer is not None
    outputs = [written(dialect, ("get", {})), '{"name": "Ada"}', "Ada", written(dialect, ("get", {"a": 1}))]
    if dialect.form is LLAMA3_JSON:
        with pytest.raises(RequestError, match="cannot be told from an answer in JSON"):
            read("auto", dialect).grammar(answer, Warnings())
    else:
        assert allowed(read("auto", dialect).grammar(answer, Warnings()), folder, outputs) == [True, True, False, False]
    assert read("required", dialect).grammar(answer, Warnings()) == bound("required", dialect)
    with pytest.raises(RequestError, match="leaves no room for calls"):
        read("auto", dialect).grammar(Grammar("regex", "a"), Warnings())


def test_a_large_set_of_tools_is_refused_only_where_it_makes_a_grammar() -> None:
    many = [function(f"f{number}", {"properties": {"x": {"enum": ["y" * 3000]}}}) for number in range(100)]
    assert bound("auto", tools=many) is None
    with pytest.raises(RequestError, match="tools makes a grammar of") as caught:
        bound("required", tools=many)
    assert caught.value.fault is Fault.TOO_LARGE


def test_the_server_knows_every_format() -> None:
    assert (AUTO, NONE, *TOOL_FORMATS) == serve_config.TOOL_PARSERS
    with pytest.raises(ValueError, match="tool_parser='xml' is unknown: choose one of auto, none, hermes, "):
        ServeConfig(tool_parser="xml")


def test_dialects(make_checkpoint: MakeCheckpoint, tokenizer: Tokenizer, llama: Tokenizer) -> None:
    assert ToolDialect.of(None) is None
    assert ToolDialect.of(tokenizer) is None
    assert ToolDialect.of(tokenizer, "hermes") == ToolDialect(HERMES)
    assert ToolDialect.of(llama, "hermes") == ToolDialect(HERMES)
    other = opened(make_checkpoint(QWEN_TEMPLATE.replace('{"name"', '<function=name>{"name"'), TOOL_TOKENS))
    assert ToolDialect.of(other) is None
    assert ToolDialect.of(other, "hermes") == ToolDialect(HERMES, MARKED)


def test_calls_may_be_left_in_the_text(tokenizer: Tokenizer) -> None:
    dialect = ToolDialect.of(tokenizer, NONE)
    assert dialect is not None
    tools = read("auto", dialect)
    assert (tools.specs, tools.parser(lambda: "")) == (TOOLS, None)
    answer = grammar_of(guided_json={})
    assert tools.grammar(answer, Warnings()) == answer
    for choice in ("required", named("get")):
        with pytest.raises(RequestError, match="leaves calls in the text"):
            read(choice, dialect)

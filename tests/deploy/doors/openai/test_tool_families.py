"""What each family of models writes is read as the same calls, whole and cut anywhere, and is what its grammar allows."""

import json
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.doors.openai.tools.events import CallArguments, CallBegin, Event, PlainText
from deploy.doors.openai.tools.families.known import TOOL_FORMATS, format_shown
from deploy.doors.openai.tools.families.values import kinds_of
from deploy.doors.openai.tools.formats import validate
from deploy.doors.openai.tools.tool_calls import ToolCallParser
from deploy.doors.openai.tools.tools import ToolDialect, Tools, read_tools
from deploy.doors.openai.warnings import Warnings
from deploy.frontend.errors import RequestError
from scheduler.protocol.sampling import Grammar
from tests.deploy.doors.openai.conftest import LLAMA_TEMPLATE, QWEN_TEMPLATE, MakeCheckpoint, opened, vocabulary
from tests.deploy.doors.openai.matching import accepts

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "metric": {"type": "boolean"},
        "unit": {"enum": ["C", "F"]},
        "at": {"$ref": "#/$defs/place"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}, "additionalProperties": False}},
}
SCHEMAS: dict[str, Any] = {"get_weather": WEATHER, "get_time": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]

PARIS = {"city": "Paris", "days": 3}
V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
V31 = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
KIMI = "<|tool_call_begin|>functions.{}:{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
QWEN3 = "<tool_call>\n<function={}>\n{}</function>\n</tool_call>"
PARAMETER = "<parameter={}>\n{}\n</parameter>\n"
GLM = "<tool_call>{}\n{}</tool_call>"
ARGUMENT = "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n"

ONE = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>',
    "qwen3_coder": QWEN3.format("get_weather", PARAMETER.format("city", "Paris") + PARAMETER.format("days", 3)),
    "llama3_json": '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}',
    "pythonic": '[get_weather(city="Paris", days=3)]',
    "mistral": '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}]',
    "mistral_v11": '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 3}',
    "deepseek_v3": f"<｜tool▁calls▁begin｜>{V3.format('get_weather', json.dumps(PARIS))}<｜tool▁calls▁end｜>",
    "deepseek_v31": f"<｜tool▁calls▁begin｜>{V31.format('get_weather', json.dumps(PARIS))}<｜tool▁calls▁end｜>",
    "glm45": GLM.format("get_weather", ARGUMENT.format("city", "Paris") + ARGUMENT.format("days", 3)),
    "kimi_k2": "<|tool_calls_section_begin|>" + KIMI.format("get_weather", 0, json.dumps(PARIS)) + "<|tool_calls_section_end|>",
    "openai": f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{json.dumps(PARIS)}",
}
"""One call, as the grammar of each family writes it."""

TWO = {
    "hermes": ONE["hermes"] + '\n<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>',
    "qwen3_coder": ONE["qwen3_coder"] + "\n" + QWEN3.format("get_time", ""),
    "llama3_json": ONE["llama3_json"] + '; {"name": "get_time", "parameters": {}}',
    "pythonic": '[get_weather(city="Paris", days=3), get_time()]',
    "mistral": ONE["mistral"][:-1] + ', {"name": "get_time", "arguments": {}}]',
    "mistral_v11": ONE["mistral_v11"] + "[TOOL_CALLS]get_time[ARGS]{}",
    "deepseek_v3": (
        "<｜tool▁calls▁begin｜>" + V3.format("get_weather", json.dumps(PARIS)) + "\n" + V3.format("get_time", "{}")
        + "<｜tool▁calls▁end｜>"
    ),
    "deepseek_v31": (
        "<｜tool▁calls▁begin｜>" + V31.format("get_weather", json.dumps(PARIS)) + V31.format("get_time", "{}")
        + "<｜tool▁calls▁end｜>"
    ),
    "glm45": ONE["glm45"] + "\n" + GLM.format("get_time", ""),
    "kimi_k2": (
        "<|tool_calls_section_begin|>" + KIMI.format("get_weather", 0, json.dumps(PARIS)) + KIMI.format("get_time", 1, "{}")
        + "<|tool_calls_section_end|>"
    ),
}  # fmt: skip

MORE: list[tuple[str, str, list[tuple[str, Any]]]] = [
    # values are what the schema says they are, whatever they look like
    (
        "qwen3_coder",
        QWEN3.format("get_weather", PARAMETER.format("city", "3") + PARAMETER.format("metric", "True")
                     + PARAMETER.format("at", '{"x": 1.5}') + PARAMETER.format("note", "null")),
        [("get_weather", {"city": "3", "metric": True, "at": {"x": 1.5}, "note": None})],
    ),
    (
        "qwen3_coder",  # many lines, and text that looks like tags
        QWEN3.format("get_weather", PARAMETER.format("city", 'a\n\n"b" </param> \\ é\n') + PARAMETER.format("days", "many")),
        [("get_weather", {"city": 'a\n\n"b" </param> \\ é\n', "days": "many"})],
    ),
    ("qwen3_coder", "<function=get_time>\n</function>\n</tool_call>", [("get_time", {})]),
    ("qwen3_coder", "<tool_call>\n<function=get_weather><parameter=city>Rome</parameter></function></tool_call>",
     [("get_weather", {"city": "Rome"})]),
    ("qwen3_coder", "<tool_call><function=get_time></function></tool_call>", [("get_time", {})]),
    ("glm45", "<tool_call>get_weather <arg_key>city</arg_key> <arg_value>Rome</arg_value> </tool_call>",
     [("get_weather", {"city": "Rome"})]),
    ("glm45", "<tool_call>get_weather<arg_key>city</arg_key><arg_value> 7 </arg_value><arg_key>at</arg_key>"
     "<arg_value>{}</arg_value></tool_call>", [("get_weather", {"city": " 7 ", "at": {}})]),
    ("glm45", "<tool_call>get_time</tool_call>", [("get_time", {})]),
    ("pythonic", "[get_weather(city='it\\'s (here), [there]', at={'x': 1.5, 'y': [True, None]}, metric=True)]",
     [("get_weather", {"city": "it's (here), [there]", "at": {"x": 1.5, "y": [True, None]}, "metric": True})]),
    ("pythonic", '<|python_start|>[get_weather(city="a\\n", note=None ),  get_time( )]<|python_end|>',
     [("get_weather", {"city": "a\n", "note": None}), ("get_time", {})]),
    ("pythonic", "[get_weather(city=Paris, at={\"x\": true})]", [("get_weather", {"city": "Paris", "at": {"x": True}})]),
    ("pythonic", '[get_weather(city="Rome", )]', [("get_weather", {"city": "Rome"})]),
    ("llama3_json", '<|python_tag|>{"type": "function", "name": "get_time", "parameters": {}}', [("get_time", {})]),
    ("mistral", '[TOOL_CALLS][{"name": "get_time", "arguments": {}, "id": "abcdefghi"}]', [("get_time", {})]),
    ("mistral", '[TOOL_CALLS]{"arguments": {}, "name": "get_time"}', [("get_time", {})]),
    ("mistral_v11", '[TOOL_CALLS]get_time{"a": {}}', [("get_time", {"a": {}})]),
    ("deepseek_v31", V31.format("get_time", ' {"a": "｜>"}'), [("get_time", {"a": "｜>"})]),
    ("kimi_k2", "<|tool_calls_section_begin|>\n" + KIMI.format("get_time", 0, '\n{"a": 1}\n') + "\n<|tool_calls_section_end|>",
     [("get_time", {"a": 1})]),
    ("openai", 'to=functions.get_time<|channel|>commentary json<|message|>{"a": 1}<|call|>', [("get_time", {"a": 1})]),
    ("openai", '<|start|>assistant<|channel|>commentary to=functions.get_time <|constrain|>json<|message|>{}<|call|>',
     [("get_time", {})]),
    ("openai", '<|channel|>analysis to=functions.get_time code<|message|>{}', [("get_time", {})]),
]  # fmt: skip

NO_CALLS = {
    "hermes": ['<tool_call>\n{"name": "get_rain", "arguments": {}}\n</tool_call>', "<tool_call>get_time</tool_call>"],
    "qwen3_coder": [
        "<tool_call>\n<function=get_rain>\n</function>\n</tool_call>", "<tool_call>\nget_time()\n</tool_call>", "a <function",
        "if a <tool_call> b", "<tool_call>\n<function=get_time",
    ],
    "llama3_json": ['{"name": "get_rain", "parameters": {}}', 'See {"name": "get_time", "parameters": {}}'],
    "pythonic": ["[get_rain()]", "[1, 2]", "[get_time]", "[get_weather('Paris')]", "Call [get_time()]", "[", "get_time()"],
    "mistral": ["[TOOL_CALLS] [1]", "[TOOL_CALLS]get_time", '[{"name": "get_time", "arguments": {}}]', "[TOOL"],
    "mistral_v11": ["[TOOL_CALLS]get_rain[ARGS]{}", "[TOOL_CALLS]get_time[ARGS]", "[TOOL_CALLS]get_time 3"],
    "deepseek_v3": [
        f"<｜tool▁calls▁begin｜>{V3.format('get_rain', '{}')}<｜tool▁calls▁end｜>", V31.format("get_time", "{}"),
        "<｜tool▁calls▁begin｜>text<｜tool▁calls▁end｜>", "<｜tool",
    ],
    "deepseek_v31": [
        V31.format("get_rain", "{}"), "<｜tool▁call▁begin｜>get_time<｜tool▁call▁end｜>", V31.format("get_time", "[]"),
    ],
    "glm45": ["<tool_call>get_rain\n</tool_call>", "<tool_call>get_time and more", "<tool_call>\n{}</tool_call>"],
    "kimi_k2": [KIMI.format("get_rain", 0, "{}"), "<|tool_call_begin|>get_time<|tool_call_argument_begin|>{}<|tool_call_end|>"],
    "openai": [
        "<|channel|>final<|message|>Hello", "<|channel|>commentary to=functions.get_rain<|message|>{}", "to=functions.x",
    ],
}  # fmt: skip

TEMPLATES = {
    "hermes": QWEN_TEMPLATE,
    "qwen3_coder": "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>",
    "llama3_json": LLAMA_TEMPLATE,
    "pythonic": "You MUST put it in the format of [func_name1(params_name1=params_value1, ...), func_name2(params)]",
    "mistral": "{{- '[TOOL_CALLS] [' }}{{ out[:-1] }}{{ ', \"id\": \"' }}",
    "mistral_v11": "{{- '[TOOL_CALLS]' + name + '[CALL_ID]' + id + '[ARGS]' + arguments }}",
    "deepseek_v3": "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + type + '<｜tool▁sep｜>' + name + '\\n' + '```json' + '\\n'",
    "deepseek_v31": "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' + arguments",
    "glm45": "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>",
    "kimi_k2": "<|tool_calls_section_begin|>{%- for call in calls %}<|tool_call_begin|>{{ call.id }}",
    "openai": '" to=functions." + name + "<|channel|>commentary json<|message|>"',
}
"""The part of each family's template that says how calls are written."""


def parse(
    family: str, pieces: list[str], parallel: bool = True, schemas: Mapping[str, Any] = SCHEMAS
) -> tuple[list[Event], str]:
    """The events, neighbours of one kind put together, and all text among them."""
    numbers = count()
    parser = ToolCallParser(TOOL_FORMATS[family], schemas, lambda: f"call_{next(numbers)}", parallel=parallel)
    merged: list[Event] = []
    for event in [*(event for piece in pieces for event in parser.push(piece)), *parser.flush()]:
        match merged[-1:], event:
            case [PlainText(before)], PlainText(text):
                merged[-1] = PlainText(before + text)
            case [CallArguments(index, before)], CallArguments(same, text) if index == same:
                merged[-1] = CallArguments(index, before + text)
            case _:
                merged.append(event)
    return merged, "".join(event.text for event in merged if isinstance(event, PlainText))


def called(events: list[Event]) -> list[tuple[str, Any]]:
    """Functions and their arguments."""
    arguments = {event.index: event.text for event in events if isinstance(event, CallArguments)}
    return [(event.name, json.loads(arguments[event.index])) for event in events if isinstance(event, CallBegin)]


CALLS = [
    *((family, text, [("get_weather", PARIS)]) for family, text in ONE.items()),
    *((family, text, [("get_weather", PARIS), ("get_time", {})]) for family, text in TWO.items()),
    *MORE,
]


def test_every_family_is_tested() -> None:
    assert ONE.keys() == NO_CALLS.keys() == TEMPLATES.keys() == TOOL_FORMATS.keys()


@pytest.mark.parametrize(("family", "text", "calls"), CALLS)
def test_calls_are_read_wherever_they_are_cut(family: str, text: str, calls: list[tuple[str, Any]]) -> None:
    events, shown = parse(family, [text])
    assert (called(events), shown) == (calls, "")
    assert parse(family, list(text))[0] == events
    for at in range(len(text)):
        assert parse(family, [text[:at], text[at:]])[0] == events


@pytest.mark.parametrize(("family", "text"), [(family, text) for family, texts in NO_CALLS.items() for text in texts])
def test_what_is_no_call_stays_text(family: str, text: str) -> None:
    for pieces in ([text], list(text), [text[:7], text[7:]]):
        assert parse(family, pieces)[0] == [PlainText(text)]


@pytest.mark.parametrize("family", [family for family, form in TOOL_FORMATS.items() if form.begins])
def test_text_around_calls_is_kept_as_it_was(family: str) -> None:
    """But for what the template itself writes between an answer and a call."""
    gap = TOOL_FORMATS[family].gap
    text = f"  I look < at it. \n{gap}{ONE[family]}\n  Done. "
    events, shown = parse(family, [text])
    assert shown == "  I look < at it. \n\n  Done. "
    assert called(events) == [("get_weather", PARIS)]
    assert parse(family, list(text))[0] == events
    assert parse(family, [f"\n{ONE[family]}\n"])[1] == ""


@pytest.mark.parametrize("family", TWO)
def test_one_call_is_told_where_only_one_is_wanted(family: str) -> None:
    events, shown = parse(family, [TWO[family]], parallel=False)
    assert (called(events), shown) == ([("get_weather", PARIS)], "")


@pytest.mark.parametrize("family", ["hermes", "qwen3_coder", "glm45", "kimi_k2", "deepseek_v31", "mistral", "llama3_json"])
def test_a_string_is_told_as_it_grows(family: str) -> None:
    before, _, after = ONE[family].partition("Paris")
    parser = ToolCallParser(TOOL_FORMATS[family], SCHEMAS, lambda: "id")
    (_, *begun) = parser.push(before)
    assert begun
    assert parser.push("Pa") == [CallArguments(0, "Pa")]
    assert parser.push('r"') != []
    assert parser.push(after) != []


@pytest.mark.parametrize("family", ["hermes", "qwen3_coder", "glm45", "kimi_k2"])
def test_a_call_that_is_cut_off_is_told_as_far_as_it_came(family: str) -> None:
    before, _, _ = ONE[family].partition("ris")
    events, shown = parse(family, [before])
    assert events[1:] == [CallArguments(0, '{"city": "Pa')]
    assert shown == ""


def test_arguments_in_python_are_told_when_they_are_whole() -> None:
    parser = ToolCallParser(TOOL_FORMATS["pythonic"], SCHEMAS, lambda: "id")
    assert parser.push("[get_weather(city='Pa") == [CallBegin(0, "id", "get_weather"), CallArguments(0, "{")]
    assert parser.push("ris', da") == [CallArguments(0, '"city": "Paris"')]
    assert parser.push("ys=3") == [CallArguments(0, ", ")]
    assert parser.flush() == []  # cut off


def test_kimi_keeps_its_own_ids() -> None:
    events, _ = parse("kimi_k2", [TWO["kimi_k2"]])
    ids = [event.id for event in events if isinstance(event, CallBegin)]
    assert ids == ["functions.get_weather:0", "functions.get_time:1"]
    events, _ = parse("mistral_v11", ["[TOOL_CALLS]get_time[CALL_ID]abcdefghi[ARGS]{}"])
    assert events[0] == CallBegin(0, "abcdefghi", "get_time")


SIGNS = [
    "<tool_call>", "</tool_call>", "<function=", "get_time", ">", "<parameter=", "</parameter>", "</function>", "city", "\n",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "[TOOL_CALLS]", "[ARGS]", "[", "]", "(", ")", "=", ",", "'",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "{", "}", '"', "\\",
    "get_weather", "<|tool_call_begin|>", "functions.get_time:0", "<|tool_call_argument_begin|>", "<|channel|>",
    " to=functions.", "<|message|>",
]  # fmt: skip


@settings(max_examples=300)
@given(family=st.sampled_from([*TOOL_FORMATS]), signs=st.lists(st.sampled_from(SIGNS), max_size=30), data=st.data())
def test_any_text_is_told_the_same_however_it_is_cut(family: str, signs: list[str], data: st.DataObject) -> None:
    text = "".join(signs)
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    events, shown = parse(family, [text])
    assert parse(family, pieces)[0] == parse(family, list(text))[0] == events
    if not any(isinstance(event, CallBegin) for event in events):
        assert shown == text


@pytest.mark.parametrize("family", TOOL_FORMATS)
def test_long_outputs_are_read_once(family: str) -> None:
    """Attempts that all fail at the end: a reader that begins anew after each takes minutes."""
    form = TOOL_FORMATS[family]
    attempt = (form.begins[-1] if form.begins else "[{(") + '{"id": ['
    text, end = attempt * 20_000, "]}" * 20_000
    parser = ToolCallParser(form, SCHEMAS, lambda: "id")
    events = [*parser.push(text[:1000]), *parser.push(text[1000:]), *parser.push(end), *parser.flush()]
    assert "".join(event.text for event in events if isinstance(event, PlainText)) == text + end


# ---- templates and grammars


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_template_says_which_family_it_is(family: str) -> None:
    form = format_shown(TEMPLATES[family])
    assert form is not None
    assert form.name == family
    assert format_shown("{{ message.content }}") is None


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

"""What each family of models writes is read as the same calls, whole and cut anywhere."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.doors.dialects.tools.events import CallArguments, CallBegin, PlainText
from deploy.doors.dialects.tools.families.known import TOOL_FORMATS, format_shown
from deploy.doors.dialects.tools.tool_calls import ToolCallParser
from tests.deploy.doors.dialects.tool_calls import (
    KIMI,
    ONE,
    PARAMETER,
    PARIS,
    QWEN3,
    SCHEMAS,
    TEMPLATES,
    TWO,
    V3,
    V31,
    called,
    parse,
)  # fmt: skip
from tests.shared.examples import examples

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
    ("qwen3_coder", QWEN3.format("get_weather", PARAMETER.format("note", "3") + PARAMETER.format("days", '"3"')),
     [("get_weather", {"note": "3", "days": "3"})]),
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


@settings(max_examples=examples(300))
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


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_template_says_which_family_it_is(family: str) -> None:
    form = format_shown(TEMPLATES[family])
    assert form is not None
    assert form.name == family
    assert format_shown("{{ message.content }}") is None

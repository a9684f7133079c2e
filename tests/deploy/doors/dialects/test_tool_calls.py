"""Calls are told from text as it comes, whichever borders cut it, and nothing is lost or told twice."""

import json
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.doors.dialects.tools.events import CallArguments, CallBegin, Event, PlainText
from deploy.doors.dialects.tools.families.format import ToolFormat
from deploy.doors.dialects.tools.families.objects import HERMES, LLAMA3_JSON, ObjectFormat
from deploy.doors.dialects.tools.tool_calls import ToolCallParser
from tests.deploy.doors.dialects.tool_calls import whole
from tests.shared.examples import examples

NAMES: dict[str, dict[str, Any]] = {"get_weather": {}, "add": {}, "f": {}}
FORMS = (HERMES, LLAMA3_JSON)


def numbered() -> Callable[[], str]:
    numbers = count()
    return lambda: f"call_{next(numbers)}"


def parse(form: ToolFormat, pieces: Sequence[str], parallel: bool = True) -> list[Event]:
    parser = ToolCallParser(form, NAMES, numbered(), parallel=parallel)
    events = [event for piece in pieces for event in parser.push(piece)]
    return whole([*events, *parser.flush()])


def call(index: int, name: str, arguments: str) -> list[Event]:
    return [CallBegin(index, f"call_{index}", name), CallArguments(index, arguments)]


def told(text: str) -> list[Event]:
    return [PlainText(text)] if text else []


WEATHER = '{"city": "Paris", "unit": "°C"}'

HERMES_SAMPLES: list[tuple[str, list[Event]]] = [
    (f'<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>', call(0, "get_weather", WEATHER)),
    (
        'Let me see.\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, {}]}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\nDone.',
        [PlainText("Let me see.\n"), *call(0, "add", '{"a": 1, "b": [2, {}]}'), *call(1, "f", "{}"), PlainText("\nDone.")],
    ),
    # Hermes 2 wrote the arguments first
    ('<tool_call>\n{"arguments": {"s": "}<\\"/"}, "name": "f"}\n</tool_call>', call(0, "f", '{"s": "}<\\"/"}')),
    ('<tool_call>{"id": 7, "type": "function", "name": "f", "arguments": {}}</tool_call>', call(0, "f", "{}")),
    ('<tool_call>{"name": "f"}</tool_call>', call(0, "f", "{}")),
    ('<tool_call>{"name": "\\u0066", "arguments": {}}</tool_call>', call(0, "f", "{}")),
    # what small models get wrong
    ('<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>', call(0, "f", '{"a": 1}')),
    ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}}\n</tool_call>', call(0, "f", '{"a": 1}')),
    (
        '<tool_call>\n{"name": "f", "arguments": {}}\n<tool_call>{"name": "add", "arguments": {}}',
        [*call(0, "f", "{}"), *call(1, "add", "{}")],
    ),
    ('<tool_call>{"name": "f", "arguments": {}, "id": "x"}</tool_call>', call(0, "f", "{}")),
    ('<tool_call>{"name": "f", "arguments": {}} and then', [*call(0, "f", "{}"), PlainText(" and then")]),
    ('<tool_call>{"name": "f", "arguments": {}}, "and', [*call(0, "f", "{}"), PlainText(', "and')]),
    # cut off by the length
    ('<tool_call>\n{"name": "f", "arguments": {"a": "x', call(0, "f", '{"a": "x')),
    ('<tool_call><tool_call>{"name": "f", "arguments": {}}', [PlainText("<tool_call>"), *call(0, "f", "{}")]),
]  # fmt: skip

LLAMA_SAMPLES: list[tuple[str, list[Event]]] = [
    (f'{{"name": "get_weather", "parameters": {WEATHER}}}', call(0, "get_weather", WEATHER)),
    (f'<|python_tag|>{{"name": "f", "parameters": {WEATHER}}}', call(0, "f", WEATHER)),
    (
        '{"name": "add", "parameters": {"a": "1; 2"}}; {"type": "function", "name": "f", "parameters": {}}',
        [*call(0, "add", '{"a": "1; 2"}'), *call(1, "f", "{}")],
    ),
    ('{"name": "f", "parameters": {}}\n{"name": "add", "parameters": {}}', call(0, "f", "{}") + call(1, "add", "{}")),
    ('{"name": "f", "parameters": {}}; sorry', [*call(0, "f", "{}"), PlainText(" sorry")]),
    ('{"name": "f", "parameters": {}} {"name": "no"}', [*call(0, "f", "{}"), PlainText(' {"name": "no"}')]),
]  # fmt: skip

ANSWERS = [
    (HERMES, "Just an answer, 3 < 4.\n"),
    (HERMES, '<tool_call>\n{"name": "f", "argu'),
    (HERMES, "a <tool_c"),
    (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>'),
    (HERMES, "<tool_call>f()</tool_call>"),
    (HERMES, '{"name": "f", "arguments": {}}'),
    (LLAMA3_JSON, "  An answer { with braces }\n"),
    (LLAMA3_JSON, '{"name": "Ada", "born": 1815}'),
    (LLAMA3_JSON, '{"city": "Paris"}'),
    (LLAMA3_JSON, 'See {"name": "f", "parameters": {}}'),
    (LLAMA3_JSON, '{"name": "f", "para'),
]
"""Texts without a call in them."""

SAMPLES: list[tuple[ToolFormat, str, list[Event]]] = [
    *((HERMES, *sample) for sample in HERMES_SAMPLES),
    *((LLAMA3_JSON, *sample) for sample in LLAMA_SAMPLES),
    *((form, text, told(text)) for form, text in ANSWERS),
    *((form, "", []) for form in FORMS),
]


@pytest.mark.parametrize(("form", "text", "events"), SAMPLES)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_samples(form: ToolFormat, text: str, events: list[Event], size: int) -> None:
    assert parse(form, [text[at : at + size] for at in range(0, len(text), size)]) == events


def test_told_as_soon_as_it_is_certain() -> None:
    parser = ToolCallParser(HERMES, NAMES, numbered())
    steps: list[tuple[str, list[Event]]] = [
        ("Hello", [PlainText("Hello")]),
        (" you <", [PlainText(" you")]),
        ("b>", [PlainText(" <b>")]),
        (' <tool_call>{"name": "add"', []),
        (', "arguments":', []),
        ('{"a', [PlainText(" "), CallBegin(0, "call_0", "add"), CallArguments(0, '{"a')]),
        ('": "\\', [CallArguments(0, '": "\\')]),
        ('"}"', [CallArguments(0, '"}"')]),
        ("} }</tool_call>", [CallArguments(0, "}")]),
        ("bye", [PlainText("bye")]),
    ]
    for text, events in steps:
        assert parser.push(text) == events
    assert parser.called
    assert parser.flush() == []


def test_json_that_is_no_call_is_shown_at_its_first_strange_key() -> None:
    parser = ToolCallParser(LLAMA3_JSON, NAMES, numbered())
    assert parser.push('{"answer') == []
    assert parser.push('": 4') == [PlainText('{"answer": 4')]
    assert parser.push("2") == [PlainText("2")]
    assert not parser.called


@pytest.mark.parametrize("form", FORMS)
def test_one_call_at_a_time(form: ObjectFormat) -> None:
    one = f'{form.begin}{{"name": "f", "{form.key}": {{"a": 1}}}}{form.end}'
    assert parse(form, [one, " ", one], parallel=False) == call(0, "f", '{"a": 1}')


@pytest.mark.parametrize("form", FORMS)
def test_long_outputs_are_read_once(form: ObjectFormat) -> None:
    """Nested attempts that all fail at the end: a reader that begins anew after each takes minutes."""
    attempt = (form.begin or "{") + '{"id": ['
    text = attempt * 20_000
    assert parse(form, [text[:1000], text[1000:], "]}" * 20_000]) == [PlainText(text + "]}" * 20_000)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
SPACE = st.text(" \n\t", max_size=3)
SIGNS = ["<tool_call>", "</tool_call>", "<|python_tag|>", "<tool", "{", "}", '"', "\\", "[", "]", ",", ":", ";", " ", "\n"]
SIGNS += ['"name"', '"arguments"', '"parameters"', '"id"', '"f"', '"add"', "f", "é", "1"]


@st.composite
def cuts(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> list[str]:
    """A text in pieces, some of them empty."""
    text = draw(texts)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@settings(max_examples=examples(200))
@given(form=st.sampled_from(FORMS), pieces=cuts(st.lists(st.sampled_from(SIGNS), max_size=40).map("".join)))
def test_any_text_is_told_the_same_however_it_is_cut(form: ToolFormat, pieces: list[str]) -> None:
    text = "".join(pieces)
    events = parse(form, [text])
    assert parse(form, pieces) == events
    assert parse(form, list(text)) == events
    if not any(isinstance(event, CallBegin) for event in events):
        assert events == told(text)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[ToolFormat, str, list[Event]]:
    """An output with calls, and what it says."""
    form = draw(st.sampled_from(FORMS))
    plain = st.text(st.characters(exclude_characters="<{", codec="utf-8")).map(str.strip)
    calls: list[tuple[str, Any]] = draw(
        st.lists(st.tuples(st.sampled_from([*NAMES]), st.dictionaries(st.text(), JSON, max_size=3)), min_size=1, max_size=3)
    )
    before = draw(plain) if form.begin else ""
    text, events = before, list[Event]()
    for index, (name, arguments) in enumerate(calls):
        written = json.dumps(arguments, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
        members = [f'"name": {json.dumps(name)}', f'"{form.key}": {written}']
        body = ", ".join(reversed(members) if draw(st.booleans()) else members)
        space, inner, behind = draw(SPACE), draw(SPACE), draw(SPACE)
        text += f"{space}{form.begin}{inner if form.begin else ''}{{{body}}}{behind}{form.end.strip() or ';'}"
        if before and not index:
            events += told(before + space.removesuffix(form.gap))
        events += call(index, name, written)
    space, after = draw(SPACE), draw(plain)
    return form, text + space + after, events + told(space + after if after else "")


@settings(max_examples=examples(200))
@given(sample=conversations(), data=st.data())
def test_calls_are_found_with_their_arguments(sample: tuple[ToolFormat, str, list[Event]], data: st.DataObject) -> None:
    form, text, events = sample
    assert parse(form, [text]) == events
    assert parse(form, data.draw(cuts(st.just(text)))) == events
    for event in events:
        if isinstance(event, CallArguments):
            assert isinstance(json.loads(event.text), dict)

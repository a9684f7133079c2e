"""What each family of models writes, from their chat templates and documentation, and what a parser makes of it."""

import json
from collections.abc import Iterable, Mapping
from itertools import count
from typing import Any

from deploy.doors.dialects.tools.events import CallArguments, CallBegin, Event, PlainText
from deploy.doors.dialects.tools.families.known import TOOL_FORMATS
from deploy.doors.dialects.tools.tool_calls import ToolCallParser
from tests.deploy.doors.dialects.conftest import LLAMA_TEMPLATE, QWEN_TEMPLATE

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


def whole(events: Iterable[Event]) -> list[Event]:
    """Events with neighbours of one kind put together."""
    merged: list[Event] = []
    for event in events:
        match merged[-1:], event:
            case [PlainText(before)], PlainText(text):
                merged[-1] = PlainText(before + text)
            case [CallArguments(index, before)], CallArguments(same, text) if index == same:
                merged[-1] = CallArguments(index, before + text)
            case _:
                merged.append(event)
    return merged


def parse(
    family: str, pieces: list[str], parallel: bool = True, schemas: Mapping[str, Any] = SCHEMAS
) -> tuple[list[Event], str]:
    """The events, neighbours of one kind put together, and all text among them."""
    numbers = count()
    parser = ToolCallParser(TOOL_FORMATS[family], schemas, lambda: f"call_{next(numbers)}", parallel=parallel)
    merged = whole([*(event for piece in pieces for event in parser.push(piece)), *parser.flush()])
    return merged, "".join(event.text for event in merged if isinstance(event, PlainText))


def called(events: list[Event]) -> list[tuple[str, Any]]:
    """Functions and their arguments."""
    arguments = {event.index: event.text for event in events if isinstance(event, CallArguments)}
    return [(event.name, json.loads(arguments[event.index])) for event in events if isinstance(event, CallBegin)]

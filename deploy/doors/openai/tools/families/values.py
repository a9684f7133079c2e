"""Values of arguments that a model writes as plain text: which kinds a schema lets them be, and what they are in JSON.

Imports nothing but how references are followed.
"""

import ast
import json
from collections.abc import Mapping
from typing import Any

from deploy.doors.openai.tools.schemas import target

Schema = Mapping[str, Any]
Kinds = frozenset[str]

ALL: Kinds = frozenset(("string", "number", "integer", "boolean", "null", "object", "array"))
STRING: Kinds = frozenset(("string",))
MOST_REFERENCES = 16
PYTHON = {"True": "true", "False": "false", "None": "null"}


def kinds_of(schema: Any, root: Schema, references: int = 0) -> Kinds:
    """What a schema lets a value be; a number may be an integer."""
    if not isinstance(schema, Mapping) or references > MOST_REFERENCES:
        return ALL
    if isinstance(reference := schema.get("$ref"), str):
        return kinds_of(target(root, reference), root, references + 1)
    kinds = ALL
    if isinstance(named := schema.get("type"), str | list):
        kinds &= frozenset([named] if isinstance(named, str) else named)
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        kinds &= frozenset(kind for value in values for kind in _kinds(value))
    for key in ("anyOf", "oneOf"):
        if isinstance(parts := schema.get(key), list):
            kinds &= frozenset().union(*(kinds_of(part, root, references + 1) for part in parts))
    for part in schema.get("allOf") or ():
        kinds &= kinds_of(part, root, references + 1)
    return kinds | {"integer"} if "number" in kinds else kinds


def as_json(text: str, kinds: Kinds) -> str:
    """The value that a text stands for, as JSON: of one of the kinds if it can be read so, else a string."""
    bare = PYTHON.get(text.strip(), text.strip())
    try:
        value = json.loads(bare, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    if isinstance(value, str) and "string" in kinds:
        return json.dumps(text, ensure_ascii=False)
    if kinds.isdisjoint(_kinds(value)):
        return json.dumps(text if "string" in kinds else value, ensure_ascii=False)
    return bare


def python_as_json(text: str) -> str:
    """A literal of Python, or of JSON, as JSON; anything else as a string."""
    try:
        return json.dumps(ast.literal_eval(text.strip()), ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return as_json(text, ALL)


def _kinds(value: Any) -> tuple[str, ...]:
    match value:
        case None:
            return ("null",)
        case bool():
            return ("boolean",)
        case str():
            return ("string",)
        case int():
            return ("integer", "number")
        case float():
            return ("number", "integer") if value.is_integer() else ("number",)
        case list():
            return ("array",)
        case dict():
            return ("object",)
    return tuple(ALL)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")

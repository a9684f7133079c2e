"""Values of arguments that a model writes as plain text: which kinds a schema lets them be, and what they are in JSON.

Imports nothing but how references are followed.
"""

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploy.doors.dialects.tools.schemas import target

Schema = Mapping[str, Any]
Kinds = frozenset[str]

ALL: Kinds = frozenset(("string", "number", "integer", "boolean", "null", "object", "array"))
STRING: Kinds = frozenset(("string",))
MOST_REFERENCES = 16
DEFINITIONS = ("$defs", "definitions", "x-guidance")
SAID = {
    "type", "properties", "required", "additionalProperties", "title", "description", "$schema", "$id", "$ref", *DEFINITIONS,
}  # fmt: skip
"""Keys of a function's schema that `Arguments` stands for, or that bind nobody."""

PYTHON = {"True": "true", "False": "false", "None": "null"}


@dataclass(frozen=True, slots=True)
class Arguments:
    """Those of a function that are written one by one. properties: schemas by name. required: of these. defined: what
    references in them need, and how the compiler reads them. more: keys of the function's schema that say anything else."""

    properties: Mapping[str, Any]
    required: frozenset[str]
    defined: Schema
    more: tuple[str, ...]

    @classmethod
    def of(cls, root: Schema) -> "Arguments":
        """Clients make schemas up: what is not as it should be says nothing."""
        schema, hops = root, 0
        while isinstance(reference := schema.get("$ref"), str) and hops < MOST_REFERENCES:
            found, hops = target(root, reference), hops + 1
            schema = found if isinstance(found, Mapping) else {}
        properties, required = schema.get("properties"), schema.get("required")
        return cls(
            properties if isinstance(properties, Mapping) else {},
            frozenset(name for name in required if isinstance(name, str)) if isinstance(required, list) else frozenset(),
            {key: root[key] for key in DEFINITIONS if key in root},
            tuple(key for key in schema if key not in SAID),
        )


def kinds_of(schema: Any, root: Schema) -> Kinds:
    """What a schema lets a value be; a number may be an integer. Follows each reference once."""
    followed: dict[str, Kinds] = {}

    def kinds_in(part: Any) -> Kinds:
        if not isinstance(part, Mapping):
            return ALL
        if isinstance(reference := part.get("$ref"), str):
            if reference not in followed:
                followed[reference] = ALL  # as far as it is known where it leads back to itself
                followed[reference] = kinds_in(target(root, reference))
            return followed[reference]
        kinds = ALL
        if isinstance(named := part.get("type"), str | list):
            kinds &= frozenset([named] if isinstance(named, str) else filter(lambda kind: isinstance(kind, str), named))
        if isinstance(values := _values(part), list):
            kinds &= frozenset(kind for value in values for kind in _kinds(value))
        for key in ("anyOf", "oneOf"):
            if isinstance(choices := part.get(key), list):
                kinds &= frozenset().union(*map(kinds_in, choices))
        if isinstance(all_of := part.get("allOf"), list):
            kinds = kinds.intersection(*map(kinds_in, all_of))
        return kinds | {"integer"} if "number" in kinds else kinds

    return kinds_in(schema)


def texts_of(schema: Any) -> list[str]:
    """The strings that a schema lists, if those are all that it lets a value be."""
    values = _values(schema) if isinstance(schema, Mapping) else None
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def value_schema(schema: Any, known: Arguments) -> str:
    """JSON of the schema of one argument, with what its references need."""
    text = json.dumps(schema)
    if not isinstance(schema, Mapping):
        return text
    needed = DEFINITIONS if '"$ref"' in text else ("x-guidance",)
    return json.dumps({**{key: value for key, value in known.defined.items() if key in needed}, **schema})


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


def _values(schema: Schema) -> Any:
    return [schema["const"]] if "const" in schema else schema.get("enum")


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

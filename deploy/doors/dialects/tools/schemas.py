"""JSON schemas as people's tools write them, pydantic and zod among them, in words that the grammar compiler follows.

    schema ──followed──▶ the same in other words, and what of it no grammar can hold an output to

What the compiler does not know it passes over where it is told to be lenient, and says so. Pure functions; imports nothing of
Manta.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

Schema = Mapping[str, Any]

ONE_INSIDE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames", "unevaluatedItems")
"""Keys that hold a schema; those of the next two hold several, by name and in a list."""
NAMED_INSIDE = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTED_INSIDE = ("anyOf", "oneOf", "allOf", "prefixItems", "items")

NOT_OF_RUST = re.compile(r"(?<!\\)(?:\\\\)*(?:\(\?<?[=!]|\\[1-9]|\\k<)")
"""Look-around and references back in a regular expression, which no automaton can follow."""

UUID_VERSION = re.compile(r"uuid([1-8])")

LENIENT = {"lenient": True}
"""For the compiler: what it does not know is an annotation."""

SAID_OF_A_NAME = {"type", "title", "description", "enum", "const"}
SAID_OF_A_PATTERN = {"type", "title", "description", "pattern"}


def followed(schema: Schema, unenforced: Callable[[str], None], *, strict: bool) -> dict[str, Any]:
    """The schema in other words. unenforced: is told of each thing that is left out. strict: nothing is, so that the compiler
    refuses what it cannot follow. The schema's nesting must have been checked."""
    rewritten = _Rewriting(schema, unenforced, strict).schema(schema)
    whole: dict[str, Any] = rewritten if isinstance(rewritten, dict) else {"anyOf": [rewritten]}
    return whole if strict else guided(whole, LENIENT)


def guided(schema: Schema, how: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with what the compiler is told of it, where it does not say so itself."""
    own = schema.get("x-guidance", {})
    return {**schema, "x-guidance": {**how, **own}} if isinstance(own, Mapping) else dict(schema)


def target(schema: Schema, reference: str) -> Any:
    """The part of a schema that a reference points to; the whole of it where that cannot be told, which is no shallower."""
    part: Any = schema
    for step in unquote(reference.removeprefix("#")).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(part, list) and name.isdecimal() and int(name) < len(part):
            part = part[int(name)]
        elif isinstance(part, Mapping) and name in part:
            part = part[name]
        else:
            return schema
    return part


class _Rewriting:
    """Of one schema, which references in it point into."""

    def __init__(self, root: Schema, unenforced: Callable[[str], None], strict: bool) -> None:
        self._root = root
        self._unenforced = unenforced
        self._strict = strict

    def schema(self, schema: Any) -> Any:
        if not isinstance(schema, Mapping):
            return schema
        new = dict(schema)
        for key in ONE_INSIDE:
            if isinstance(inner := new.get(key), Mapping):
                new[key] = self.schema(inner)
        for key in NAMED_INSIDE:
            if isinstance(inner := new.get(key), Mapping):
                new[key] = {name: self.schema(each) for name, each in inner.items()}
        for key in LISTED_INSIDE:
            if isinstance(inner := new.get(key), list):
                new[key] = [self.schema(each) for each in inner]
        if new.get("not") in ({}, True) and len(new) == 1:
            return False  # as zod says that nothing will do
        self._rewrite_string(new)
        self._rewrite_names(new)
        return new

    def _rewrite_string(self, new: dict[str, Any]) -> None:
        pattern, form = new.get("pattern"), new.get("format")
        if self._beyond_rust(pattern):
            del new["pattern"]
            pattern = None
        if pattern is not None and form == "time":
            del new["format"]  # to the compiler a time has an offset, to zod it has none: the pattern says which
        if isinstance(form, str) and (version := UUID_VERSION.fullmatch(form)):
            new["format"] = "uuid"
            new.setdefault("pattern", f"^.{{14}}{version[1]}")

    def _rewrite_names(self, new: dict[str, Any]) -> None:
        """Names of members by a list or a pattern are members in so many words. Others are left to the compiler."""
        patterns = new.get("patternProperties")
        if isinstance(patterns, Mapping) and (beyond := [each for each in patterns if self._beyond_rust(each)]):
            new["patternProperties"] = {each: patterns[each] for each in patterns if each not in beyond}
            new["additionalProperties"] = True  # such members may be of any kind now
        said = new.get("propertyNames")
        if isinstance(said, Mapping) and isinstance(reference := said.get("$ref"), str):
            said = target(self._root, reference)
        if said is True or (isinstance(said, Mapping) and said.get("type", "string") == "string"):
            self._name(new, {} if said is True else said)

    def _name(self, new: dict[str, Any], said: Schema) -> None:
        extra, own = new.get("additionalProperties", {}), new.get("properties") or {}
        names, pattern = [said["const"]] if "const" in said else said.get("enum"), said.get("pattern")
        if not isinstance(own, Mapping):
            return  # for the compiler to refuse
        if said.keys() <= {"type", "title", "description"}:
            del new["propertyNames"]
        elif said.keys() <= SAID_OF_A_NAME and isinstance(names, list) and not new.get("patternProperties"):
            del new["propertyNames"]
            new["properties"] = {name: own.get(name, extra) for name in names if isinstance(name, str)}
            new["additionalProperties"] = False
        elif said.keys() <= SAID_OF_A_PATTERN and isinstance(pattern, str) and not own and not new.get("patternProperties"):
            del new["propertyNames"]
            if not self._beyond_rust(pattern):
                new |= {"patternProperties": {pattern: extra}, "additionalProperties": False}

    def _beyond_rust(self, pattern: Any) -> bool:
        """Whether the pattern is to be left out."""
        if self._strict or not isinstance(pattern, str) or not NOT_OF_RUST.search(pattern):
            return False
        self._unenforced(f"the pattern {pattern} looks around or refers back")
        return True

"""Calls as a list in Python, `[get_weather(city='Paris', days=3), get_time()]`: Llama 3.2, Llama 4.

Each argument is told when it has ended, since only then is it known what it is in JSON.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploy.doors.openai.tools.events import Events
from deploy.doors.openai.tools.families.format import FUNCTION_NAME, SPACE, CallGrammar, ToolFormat
from deploy.doors.openai.tools.families.values import kinds_of, python_as_json
from deploy.doors.openai.tools.pieces import Feed, Reading

KEYWORD = re.compile(r"\w*")
SIGN = re.compile(r"""["'\\\[\](){},]""")
OPENING, CLOSING = "[({", "])}"


@dataclass(frozen=True, slots=True)
class PythonicFormat(ToolFormat):
    """Calls with keyword arguments, in brackets."""

    def read(self, mark: str, feed: Feed, events: Events) -> Reading[bool]:  # noqa: ARG002
        yield from feed.skip(SPACE)
        if not (yield from feed.take("[")) or not (yield from self._call(feed, events)):
            return False
        while (yield from feed.take_behind_space(",")):
            behind, feed.kept = feed.at, True
            yield from feed.skip(SPACE)
            if not (yield from self._call(feed, events)):
                feed.at = behind
                break
        yield from feed.take_behind_space("]")
        yield from feed.take_behind_space("<|python_end|>")
        return True

    def _call(self, feed: Feed, events: Events) -> Reading[bool]:
        """False: it is none."""
        yield from feed.skip(SPACE)
        name = yield from feed.matching(FUNCTION_NAME)
        if name not in events.schemas or not (yield from feed.take("(")):
            return False
        yield from feed.skip(SPACE)
        ended = yield from feed.take(")")
        key = "" if ended else (yield from _keyword(feed))
        if not ended and not key:
            return False
        events.begin(name)
        events.tell("{")
        while key:
            feed.kept = True
            value, ended = yield from _value(feed)
            feed.kept = False
            if not value and feed.ended:
                return True
            events.tell(f"{json.dumps(key)}: {python_as_json(value)}")
            feed.kept = True
            yield from feed.skip(SPACE)
            key = "" if ended else (yield from _keyword(feed))
            events.tell(", " if key else "")
        feed.kept = False
        events.tell("}")
        return True

    # ---- the grammar ----

    def head(self, name: str, grammar: CallGrammar) -> str:
        return grammar.text(f"{name}(")

    def tail(self, grammar: CallGrammar) -> str:
        return grammar.text(")")

    def arguments(self, rule: str, schema: Mapping[str, Any], grammar: CallGrammar) -> list[str]:
        """Those that are required, then any of the others. Values are JSON, but for Python's truth values."""
        properties: Mapping[str, Any] = schema.get("properties") or {}
        required = [name for name in properties if name in (schema.get("required") or ())]
        others = [name for name in properties if name not in required]
        lines = [
            f"{rule}_{at}: {grammar.text(f'{name}=')} {_written(f'{rule}_{at}_value', properties[name], schema)}"
            for at, name in enumerate((*required, *others))
        ]
        comma, first = grammar.text(", "), len(required)
        needed = f" {comma} ".join(f"{rule}_{at}" for at in range(first))
        if not others:
            return [f"{rule}: {needed}", *_flat(lines)]
        for at in range(first, len(properties)):
            more = f"({rule}_more_{at + 1})?" if at + 1 < len(properties) else ""
            lines.append(f"{rule}_more_{at}: {comma} {rule}_{at} {more}" + (f" | {rule}_more_{at + 1}" if more else ""))
            begun = f" | {rule}_any_{at + 1}" if more else ""
            lines.append(f"{rule}_any_{at}: {rule}_{at} {more}{begun}")
        return [f"{rule}: {needed} ({rule}_more_{first})?" if needed else f"{rule}: ({rule}_any_{first})?", *_flat(lines)]


def _written(rule: str, value: Any, root: Mapping[str, Any]) -> str:
    if kinds_of(value, root) == {"boolean"}:
        return '("True" | "False")'
    defined = {key: root[key] for key in ("$defs", "definitions", "x-guidance") if key in root}
    return f"{rule}\n{rule}: %json {json.dumps({**defined, **value} if isinstance(value, Mapping) else value)}"


def _flat(lines: list[str]) -> list[str]:
    return [line for each in lines for line in each.split("\n")]


def _keyword(feed: Feed) -> Reading[str]:
    """A name and its equals sign; empty if something else comes. Needs `kept`."""
    yield from feed.skip(SPACE)
    name = yield from feed.matching(KEYWORD)
    return name if (yield from feed.take_behind_space("=")) else ""


def _value(feed: Feed) -> Reading[tuple[str, bool]]:
    """A value up to the comma or the bracket behind it, which is read; and whether it was the bracket. Empty if the text ends
    before that. Needs `kept`."""
    begin, depth, quote = feed.at, 0, ""
    while sign := (yield from feed.next(SIGN)):
        if sign == "\\":
            yield from feed.skip_one()
        elif quote or sign in "\"'":
            quote = "" if sign == quote else quote or sign
        elif sign in OPENING:
            depth += 1
        elif not depth and sign in (",", ")"):
            return feed.text[begin : feed.at - 1], sign == ")"
        elif sign in CLOSING:
            depth -= 1
    return "", False


PYTHONIC = PythonicFormat("pythonic", prefixes=("<|python_start|>", "<|python_tag|>"), open="[", join=", ", close="]")

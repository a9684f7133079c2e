"""Calls as a list in Python, `[get_weather(city='Paris', days=3), get_time()]`: Llama 3.2, Llama 4.

Each argument is told when it has ended, since only then is it known what it is in JSON.
"""

import json
import re
from dataclasses import dataclass

from deploy.doors.dialects.tools.events import Events
from deploy.doors.dialects.tools.families.format import FUNCTION_NAME, SPACE, CallGrammar, ToolFormat
from deploy.doors.dialects.tools.families.values import Arguments, kinds_of, python_as_json, value_schema
from deploy.doors.dialects.tools.pieces import Feed, Reading

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
            key = "" if ended else (yield from _keyword(feed))
            events.tell(", " if key else "")
        if not ended:
            ended = yield from feed.take_behind_space(")")
        feed.kept = False
        events.tell("}" if ended or not feed.ended else "")
        return True

    # ---- the grammar ----

    def head(self, name: str, grammar: CallGrammar) -> str:
        return grammar.text(f"{name}(")

    def tail(self, grammar: CallGrammar) -> str:
        return grammar.text(")")

    def arguments(self, rule: str, name: str, grammar: CallGrammar) -> list[str]:
        """Those that are required, then any of the others. Values are JSON, but for Python's truth values."""
        known = Arguments.of(grammar.schemas[name])
        for key in known.more:
            grammar.unenforced(name, key)
        names = sorted(known.properties, key=lambda argument: argument not in known.required)
        lines = list[str]()
        for at, argument in enumerate(names):
            value = known.properties[argument]
            if kinds_of(value, grammar.schemas[name]) == {"boolean"}:
                written = '("True" | "False")'
            else:
                written = f"{rule}_{at}_value"
                lines.append(f"{written}: %json {value_schema(value, known)}")
            lines.append(f"{rule}_{at}: {grammar.text(f'{argument}=')} {written}")
        return _with_commas(rule, len(names), sum(argument in known.required for argument in names), grammar.text(", ")) + lines


def _with_commas(rule: str, count: int, required: int, comma: str) -> list[str]:
    """In Lark: the first so many of the rules `rule`_0, `rule`_1, ... and any of the others, in order, with commas between."""
    needed, last = f" {comma} ".join(f"{rule}_{at}" for at in range(required)), count - 1
    if required == count:
        return [f"{rule}: {needed}"]
    lines = [f"{rule}: {needed} ({rule}_more_{required})?" if needed else f"{rule}: ({rule}_any_{required})?"]
    for at in range(required, count):
        more = f"({rule}_more_{at + 1})?" if at < last else ""
        lines.append(f"{rule}_more_{at}: {comma} {rule}_{at} {more}" + (f" | {rule}_more_{at + 1}" if more else ""))
        if not needed:
            lines.append(f"{rule}_any_{at}: {rule}_{at} {more}" + (f" | {rule}_any_{at + 1}" if more else ""))
    return lines


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

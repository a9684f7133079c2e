"""Calls whose arguments stand between tags, each as plain text: Qwen3-Coder, GLM.

A string is told as it grows; other values when they have ended, since only then is it known what they are.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from deploy.doors.dialects.tools.events import Events
from deploy.doors.dialects.tools.families.format import SPACE, CallGrammar, ToolFormat
from deploy.doors.dialects.tools.families.values import STRING, Arguments, as_json, kinds_of, texts_of, value_schema
from deploy.doors.dialects.tools.pieces import Feed, Reading

NAME_IN_TAG = re.compile(r"[^<>\s]*")
EMPTY = '""'
OF_TEXT = {"pattern", "format", "minLength", "maxLength"}
"""What a schema may ask of a string, and no text between tags is held to."""


@dataclass(frozen=True, slots=True)
class TaggedFormat(ToolFormat):
    """`begin`, `before`, the name, `after`, the arguments, `end`; each argument is `key`, its name, `key_end`, `value`, its
    value, `value_end`. White space between them is the model's affair, beside a value only the line feed that is said here."""

    begin: str = ""
    before: str = ""
    after: str = ""
    key: str = ""
    key_end: str = ""
    value: str = ""
    value_end: str = ""
    end: str = ""

    def read(self, mark: str, feed: Feed, events: Events) -> Reading[bool]:
        if self.before and mark != self.before and not (yield from feed.take_behind_space(self.before)):
            return False
        yield from feed.skip(SPACE)
        name = yield from feed.matching(NAME_IN_TAG)
        if name not in events.schemas or not (yield from self._is_call(feed)):
            return False
        feed.kept = False
        events.begin(name)
        events.tell("{")
        told = 0
        while (yield from feed.take_behind_space(self.key)):
            if not (yield from self._argument(feed, events, name, told)):
                return True
            told += 1
        ended = False
        for word in self.end.split("\n"):
            ended |= yield from feed.take_behind_space(word)
        if ended or not feed.ended:
            events.tell("}")
        return True

    def _is_call(self, feed: Feed) -> Reading[bool]:
        """What follows the name says so."""
        if self.after.strip():
            return (yield from feed.take(self.after.strip()))
        begin = feed.at
        for word in (self.key, self.end.strip()):
            if (yield from feed.take_behind_space(word)):
                feed.at = begin
                return True
        return False

    def _argument(self, feed: Feed, events: Events, function: str, told: int) -> Reading[bool]:
        """From its name on. False: the output ended in it."""
        key: list[str] = []
        if not (yield from feed.before((self.key_end,), key.append)):
            return False
        name = "".join(key).strip()
        yield from feed.take_behind_space(self.value.strip()) if self.value.strip() else feed.take(self.value)
        schema = events.schemas[function]
        kinds = kinds_of(Arguments.of(schema).properties.get(name, {}), schema)
        events.tell(f"{', ' if told else ''}{json.dumps(name, ensure_ascii=False)}: ")
        ends = tuple(dict.fromkeys((self.value_end, self.value_end.strip())))
        if kinds == STRING:
            events.tell('"')
            ended = yield from feed.before(ends, lambda text: events.tell(json.dumps(text, ensure_ascii=False)[1:-1]))
            events.tell('"' if ended else "")
            return bool(ended)
        text: list[str] = []
        ended = yield from feed.before(ends, text.append)
        events.tell(as_json("".join(text), kinds) if ended else "")
        return bool(ended)

    # ---- the grammar ----

    def head(self, name: str, grammar: CallGrammar) -> str:
        return grammar.text(f"{self.begin}{self.before}{name}{self.after}")

    def tail(self, grammar: CallGrammar) -> str:
        return grammar.text(self.end)

    def arguments(self, rule: str, name: str, grammar: CallGrammar) -> list[str]:
        """Each that is known, in order; what else a schema might let in is not written."""
        known, parts, lines = Arguments.of(grammar.schemas[name]), [], list[str]()
        for key in known.more:
            grammar.unenforced(name, key)
        for at, argument in enumerate(known.properties):
            parts.append(f"{rule}_{at}" if argument in known.required else f"({rule}_{at})?")
            value, rules = self._value(f"{rule}_{at}_value", name, argument, grammar)
            lines += [f"{rule}_{at}: {grammar.text(f'{self.key}{argument}{self.key_end}{self.value}')} {value}", *rules]
        return [f"{rule}: {' '.join(parts)}", *lines]

    def _value(self, rule: str, function: str, argument: str, grammar: CallGrammar) -> tuple[str, list[str]]:
        known = Arguments.of(grammar.schemas[function])
        value, end = known.properties[argument], self.value_end + "\n"
        kinds = kinds_of(value, grammar.schemas[function])
        if "string" not in kinds:
            return f"{rule} {grammar.text(end)}", [f"{rule}: %json {value_schema(value, known)}"]
        if kinds == STRING and (choices := texts_of(value)):
            return f"({' | '.join(grammar.text(choice) or EMPTY for choice in choices)}) {grammar.text(end)}", []
        for key in sorted(OF_TEXT & value.keys()) if isinstance(value, Mapping) else ():
            grammar.unenforced(function, f"{key} of {argument}")
        text, rules = grammar.text_up_to(self.value_end, rule)
        return f"{text} {grammar.text(chr(10))}", rules


QWEN3_CODER = TaggedFormat(
    "qwen3_coder", begins=("<tool_call>", "<function="), marks=("<tool_call>", "</tool_call>"), gap="\n", join="\n",
    begin="<tool_call>\n", before="<function=", after=">\n", key="<parameter=", key_end=">", value="\n",
    value_end="\n</parameter>", end="</function>\n</tool_call>",
)  # fmt: skip
GLM45 = TaggedFormat(
    "glm45", begins=("<tool_call>",),
    marks=("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"), gap="\n", join="\n",
    begin="<tool_call>", after="\n", key="<arg_key>", key_end="</arg_key>", value="\n<arg_value>", value_end="</arg_value>",
    end="</tool_call>",
)  # fmt: skip

"""Calls that are objects of JSON with a name and arguments: Hermes and Qwen, Llama 3, Mistral until 2024."""

import re
from dataclasses import dataclass

from deploy.doors.dialects.tools.events import Events
from deploy.doors.dialects.tools.families.format import SPACE, CallGrammar, ToolFormat, tell_object
from deploy.doors.dialects.tools.pieces import Feed, Reading

ARGUMENT_KEYS = ("arguments", "parameters")
OTHER_KEYS = ("id", "type")
"""What a call's object may hold beside its name and its arguments. Any other key says that this JSON is an answer."""

SEPARATOR = re.compile(r"[\s,;]*")


@dataclass(frozen=True, slots=True)
class ObjectFormat(ToolFormat):
    """`begin`, {"name": ..., `key`: {...}}, `end`; listed: several such objects may follow one another there."""

    key: str = "arguments"
    begin: str = ""
    end: str = ""
    listed: bool = False

    def head(self, name: str, grammar: CallGrammar) -> str:
        return grammar.text(f'{self.begin}{{"name": "{name}", "{self.key}": ')

    def tail(self, grammar: CallGrammar) -> str:
        return grammar.text("}" + self.end)

    def read(self, mark: str, feed: Feed, events: Events) -> Reading[bool]:  # noqa: ARG002
        yield from feed.skip(SPACE)
        if self.close and (yield from feed.take("[")):
            yield from feed.skip(SPACE)
        if not (yield from self._call(feed, events)):
            return False
        while self.listed:
            behind, feed.kept = feed.at, True
            yield from feed.skip(SEPARATOR)
            if not (yield from self._call(feed, events)):
                feed.at = behind
                break
        yield from feed.take_behind_space(self.end.strip() or self.close or ";")
        return True

    def _call(self, feed: Feed, events: Events) -> Reading[bool]:
        """One object. False: it is no call."""
        if not (yield from feed.take("{")) or not (yield from self._head(feed, events)):
            return False
        while True:  # what follows the arguments is read with patience: a brace too few or too many costs no call
            if not (yield from feed.take_behind_space("}")) and not (yield from self._another_member(feed)):
                return True

    def _head(self, feed: Feed, events: Events) -> Reading[bool]:
        """A call's object from its first member up to and including its arguments, and tells them. False: it is no call."""
        name, arguments = None, ""
        while True:
            key = yield from _key(feed)
            if key == "name":
                name = yield from feed.string()
                if name not in events.schemas:
                    return False
            elif key in ARGUMENT_KEYS and (yield from feed.peek()) == "{":
                if name is not None:
                    events.begin(name)
                    yield from tell_object(feed, events)
                    return True
                arguments = yield from feed.value()
            elif key not in OTHER_KEYS or not (yield from feed.value()):
                return False
            yield from feed.skip(SPACE)
            if name is not None and (arguments or (yield from feed.peek()) == "}"):
                events.begin(name)
                events.tell(arguments or "{}")
                return True
            if not (yield from feed.take(",")):
                return False

    def _another_member(self, feed: Feed) -> Reading[bool]:
        """A comma, a key and a value after the arguments. False, and nothing is read, if something else comes."""
        behind, feed.kept = feed.at, True
        yield from feed.skip(SPACE)
        found = (
            (yield from feed.take(","))
            and (yield from _key(feed)) is not None
            and (yield from feed.value()) != ""
        )  # fmt: skip
        feed.at, feed.kept = feed.at if found else behind, False
        return found


def _key(feed: Feed) -> Reading[str | None]:
    """A key and its colon; None if something else comes."""
    yield from feed.skip(SPACE)
    key = yield from feed.string()
    yield from feed.skip(SPACE)
    if not (yield from feed.take(":")):
        return None
    yield from feed.skip(SPACE)
    return key


HERMES = ObjectFormat(
    "hermes", begins=("<tool_call>",), marks=("<tool_call>", "</tool_call>"), gap="\n", join="\n", begin="<tool_call>\n",
    end="\n</tool_call>",
)  # fmt: skip
LLAMA3_JSON = ObjectFormat(
    "llama3_json", prefixes=("<|python_tag|>", "<|python_start|>"), join="; ", key="parameters", listed=True
)
MISTRAL = ObjectFormat(
    "mistral", begins=("[TOOL_CALLS]",), marks=("[TOOL_CALLS]",), open="[TOOL_CALLS] [", join=", ", close="]", listed=True
)  # fmt: skip

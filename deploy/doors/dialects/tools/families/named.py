"""Calls that are a name and, behind a mark, arguments in JSON: DeepSeek, Kimi K2, Mistral since 2025, gpt-oss."""

import re
from dataclasses import dataclass

from deploy.doors.dialects.tools.events import Events
from deploy.doors.dialects.tools.families.format import FUNCTION_NAME, SPACE, CallGrammar, ToolFormat, tell_object
from deploy.doors.dialects.tools.pieces import Feed, Reading

ID = re.compile(r"[\w.:-]*")
KIMI_ID = re.compile(r"functions\.([\w.-]+):\d+")
HARMONY_RECIPIENT = re.compile(r"\bto=functions\.([\w.-]+)")


@dataclass(frozen=True, slots=True)
class NamedFormat(ToolFormat):
    """`begin`, `before`, the name, `between`, the arguments, `end`. `open` and `close` stand around several."""

    begin: str = ""
    before: str = ""
    between: str = ""
    end: str = ""

    def head(self, name: str, grammar: CallGrammar) -> str:
        return grammar.text(f"{self.begin}{self.before}{name}{self.between}")

    def tail(self, grammar: CallGrammar) -> str:
        return grammar.text(self.end)

    def read(self, mark: str, feed: Feed, events: Events) -> Reading[bool]:
        name, id = yield from self._named(mark, feed)
        yield from feed.skip(SPACE)
        if name not in events.schemas or (yield from feed.peek()) != "{":
            return False
        events.begin(name, id)
        yield from tell_object(feed, events)
        for word in filter(None, (self.end.strip(), self.close)):
            yield from feed.take_behind_space(word)
        return True

    def _named(self, mark: str, feed: Feed) -> Reading[tuple[str, str | None]]:
        """The name, all of what stands before the arguments being read, and the id, if the model makes one. Empty: it is no
        call."""
        if not (yield from self._begun(mark, feed)) or not (yield from feed.take(self.before)):
            return "", None
        name = yield from feed.matching(FUNCTION_NAME)
        return (name if (yield from feed.take_behind_space(self.between.strip())) else ""), None

    def _begun(self, mark: str, feed: Feed) -> Reading[bool]:
        """Of several calls, the mark of the first one stands behind that of the whole."""
        return mark == self.begin or (yield from feed.take_behind_space(self.begin))


@dataclass(frozen=True, slots=True)
class KimiFormat(NamedFormat):
    """The name is a part of an id, functions.NAME:0, which the template expects to be shown again."""

    def head(self, name: str, grammar: CallGrammar) -> str:
        return f"{grammar.text(f'{self.begin}functions.{name}:')} /[0-9]{{1,3}}/ {grammar.text(self.between)}"

    def _named(self, mark: str, feed: Feed) -> Reading[tuple[str, str | None]]:
        if not (yield from self._begun(mark, feed)):
            return "", None
        yield from feed.skip(SPACE)
        id = yield from feed.matching(ID)
        named = KIMI_ID.fullmatch(id)
        if named is None or not (yield from feed.take_behind_space(self.between)):
            return "", None
        return named[1], id


@dataclass(frozen=True, slots=True)
class MistralFormat(NamedFormat):
    """An id may stand behind the name, and the mark before the arguments may be missing."""

    def _named(self, mark: str, feed: Feed) -> Reading[tuple[str, str | None]]:  # noqa: ARG002
        id = None
        name = yield from feed.matching(FUNCTION_NAME)
        if (yield from feed.take("[CALL_ID]")):
            id = yield from feed.matching(FUNCTION_NAME)
        yield from feed.take(self.between)
        return name, id


@dataclass(frozen=True, slots=True)
class HarmonyFormat(NamedFormat):
    """gpt-oss: the head of a message says to whom it goes, in the channel's part of it or before that. What stands behind the
    arguments is a token that ends the output."""

    def tail(self, grammar: CallGrammar) -> str:  # noqa: ARG002
        return ""

    def _named(self, mark: str, feed: Feed) -> Reading[tuple[str, str | None]]:
        head = [mark]
        ended = yield from feed.before(("<|message|>", "<|end|>", "\n"), head.append)
        named = HARMONY_RECIPIENT.search("".join(head))
        return (named[1] if named is not None and ended == "<|message|>" else ""), None


def _deepseek(name: str, before: str, between: str, end: str, join: str) -> NamedFormat:
    calls, call, sep = (
        ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"), ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"), "<｜tool▁sep｜>",
    )  # fmt: skip
    return NamedFormat(
        name, begins=(calls[0], call[0]), marks=(*calls, *call, sep), open=calls[0], close=calls[1], begin=call[0],
        before=before.format(sep), between=between.format(sep), end=end + call[1], join=join,
    )  # fmt: skip


DEEPSEEK_V3 = _deepseek("deepseek_v3", before="function{}", between="\n```json\n", end="\n```", join="\n")
DEEPSEEK_V31 = _deepseek("deepseek_v31", before="", between="{}", end="", join="")

_KIMI = tuple(
    f"<|tool_{part}|>" for part in ("calls_section_begin", "call_begin", "call_argument_begin", "call_end", "calls_section_end")
)
KIMI_K2 = KimiFormat(
    "kimi_k2", begins=_KIMI[:2], marks=_KIMI, open=_KIMI[0], close=_KIMI[4], begin=_KIMI[1], between=_KIMI[2], end=_KIMI[3]
)
MISTRAL_V11 = MistralFormat(
    "mistral_v11", begins=("[TOOL_CALLS]",), marks=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), begin="[TOOL_CALLS]",
    between="[ARGS]",
)  # fmt: skip
OPENAI = HarmonyFormat(
    "openai", begins=("<|start|>", "<|channel|>", " to=functions.", "to=functions."), join=None,
    marks=("<|channel|>", "<|constrain|>", "<|message|>"), begin="<|channel|>",
    before="commentary to=functions.", between=" <|constrain|>json<|message|>", end="<|call|>",
)  # fmt: skip

"""One message's output as Anthropic's blocks, whole or as events of a stream: thoughts, text and calls in the model's order.

    text ──Speech.events──▶ Thought, PlainText, CallBegin, CallArguments ──▶ blocks, or content_block_start, _delta, _stop

Imports how models speak, and the records; no HTTP.
"""

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from deploy.doors.anthropic.records import (
    Block,
    BlockDelta,
    BlockStart,
    BlockStop,
    InputDelta,
    SignatureDelta,
    StopReason,
    StreamEvent,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
)
from deploy.doors.anthropic.signatures import signature
from deploy.doors.dialects.tools.events import CallArguments, CallBegin, Event, PlainText
from deploy.doors.openai.answers.speech import Thought

MOST_CUT_TOKENS = 4
"""At the end of JSON that was cut off, those that may have to go: a comma, a name, its colon, and half a number."""

_CLOSED_BY = {"{": "}", "[": "]"}
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:"]|[^\s{}\[\],:"]+', re.DOTALL)


class BlockWriter:
    """Tells blocks as events: one is open at a time, and the next one closes it. shows_thoughts: else they are told empty."""

    def __init__(self, *, shows_thoughts: bool) -> None:
        self._shows_thoughts = shows_thoughts
        self._open: Block | None = None
        self._index = -1
        self._thought = ""

    def write(self, events: Iterable[Thought | Event]) -> Iterator[StreamEvent]:
        """What is new."""
        for each in events:
            match each:
                case Thought(text):
                    yield from self._begin(ThinkingBlock())
                    if self._shows_thoughts:
                        self._thought += text
                        yield BlockDelta(index=self._index, delta=ThinkingDelta(thinking=text))
                case PlainText(text):
                    yield from self._begin(TextBlock())
                    yield BlockDelta(index=self._index, delta=TextDelta(text=text))
                case CallBegin(_, id, name):
                    yield from self._begin(ToolUseBlock(id=id, name=name))
                case CallArguments(_, text):
                    yield BlockDelta(index=self._index, delta=InputDelta(partial_json=text))

    def end(self) -> Iterator[StreamEvent]:
        """Closes what is open."""
        if isinstance(self._open, ThinkingBlock):
            yield BlockDelta(index=self._index, delta=SignatureDelta(signature=signature(self._thought)))
            self._thought = ""
        if self._open is not None:
            yield BlockStop(index=self._index)
            self._open = None

    def _begin(self, block: Block) -> Iterator[StreamEvent]:
        """Goes on with the open block, if it is of the same kind and no call."""
        if type(self._open) is type(block) and not isinstance(block, ToolUseBlock):
            return
        yield from self.end()
        self._open, self._index = block, self._index + 1
        yield BlockStart(index=self._index, content_block=block)


def whole_blocks(events: Iterable[Thought | Event], *, shows_thoughts: bool) -> list[Block]:
    """The blocks that a stream of the same events comes to."""
    blocks: list[Block] = []
    texts: list[list[str]] = []
    for each in events:
        match each:
            case CallBegin(_, id, name):
                blocks.append(ToolUseBlock(id=id, name=name))
                texts.append([])
            case Thought(text) | PlainText(text):
                kind = ThinkingBlock if isinstance(each, Thought) else TextBlock
                if not blocks or not isinstance(blocks[-1], kind):
                    blocks.append(kind())
                    texts.append([])
                texts[-1].append(text)
            case CallArguments(_, text):
                texts[-1].append(text)
    return [_filled(block, "".join(parts), shows_thoughts) for block, parts in zip(blocks, texts, strict=True)]


def _filled(block: Block, text: str, shows_thoughts: bool) -> Block:
    match block:
        case TextBlock():
            return TextBlock(text=text)
        case ThinkingBlock():
            shown = text if shows_thoughts else ""
            return ThinkingBlock(thinking=shown, signature=signature(shown))
        case ToolUseBlock(id=id, name=name):
            return ToolUseBlock(id=id, name=name, input=read_input(text))


def stop_reason(finish_reason: str | None, cause: int | str | None, *, all_tokens: bool) -> tuple[StopReason, str | None]:
    """With the stop sequence, if that was it. finish_reason, cause: chat's `finish_reason` and `stop_reason`. all_tokens: the
    output has as many as were asked for."""
    match finish_reason:
        case "tool_calls":
            return "tool_use", None
        case "length":
            return ("max_tokens" if all_tokens else "model_context_window_exceeded"), None
    return ("stop_sequence", cause) if isinstance(cause, str) else ("end_turn", None)


def read_input(arguments: str) -> dict[str, Any]:
    """A call's arguments; of a text that was cut off, as much of them as is whole; nothing of one that is no JSON."""
    for text in (arguments, *_closed(arguments)):
        try:
            read = json.loads(text)
        except (ValueError, RecursionError):
            continue
        return read if isinstance(read, dict) else {}
    return {}


def _closed(text: str) -> Iterator[str]:
    """The text up to the end of one of its last tokens, the later ones first, with the brackets that it leaves open closed."""
    open_to: list[str] = []
    last: deque[re.Match[str]] = deque(maxlen=MOST_CUT_TOKENS + 1)
    for token in _JSON_TOKEN.finditer(text):
        if token[0] == '"':
            break  # of a string that does not end
        if token[0] in _CLOSED_BY:
            open_to.append(_CLOSED_BY[token[0]])
        elif open_to and token[0] in "}]":
            open_to.pop()
        last.append(token)
    for token in reversed(last):
        yield text[: token.end()] + "".join(reversed(open_to))
        if token[0] in _CLOSED_BY:
            open_to.pop()
        elif token[0] in "}]":
            open_to.append(token[0])

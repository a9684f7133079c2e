"""How one checkpoint thinks before it answers, told by its chat template, and what that makes of one request.

    ReasoningFormat.of(tokenizer, name) ──thinking(prompt)──▶ Thinking ──parser──▶ one `ReasoningParser` for each choice
                                                                       ──sorter──▶ which tokens are thought
                                                                       ──preamble──▶ what a grammar lets come before its own

Pure functions; imports neither HTTP nor the engine.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from deploy.doors.dialects.reasoning import channels, think
from deploy.doors.dialects.reasoning.channels import ChannelParser
from deploy.doors.dialects.reasoning.sections import BLANKS, ReasoningParser
from deploy.doors.dialects.reasoning.think import AnswerOnly, ThinkParser
from deploy.doors.dialects.reasoning.tokens import TokenSorter
from deploy.text.tokenizer import THINK_MARKS, Tokenizer

AUTO, NONE = "auto", "none"

TAIL_TOKENS = 32
"""Of a prompt, in which its last mark is looked for: a mark and white space behind it, even if each letter is a token."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """One request's. parser: a new one for the output of one choice. preamble: Lark rules of which the one called `preamble` is
    what comes before an answer that has a grammar; empty where nothing does. call_preamble: the same where the grammar is of
    calls, or of calls and answers."""

    parser: Callable[[], ReasoningParser]
    tokenizer: Tokenizer
    preamble: str
    call_preamble: str

    def sorter(self) -> TokenSorter[Any]:
        """For the tokens of one choice."""
        return TokenSorter(self.parser(), self.tokenizer)


class ReasoningFormat(ABC):
    """How outputs mark what is thought."""

    name: ClassVar[str]

    @abstractmethod
    def __init__(self, tokenizer: Tokenizer) -> None:
        """tokenizer: the checkpoint's."""

    @staticmethod
    def of(tokenizer: Tokenizer | None, name: str) -> "ReasoningFormat | None":
        """name: `auto`, `none`, or a key of `REASONING_FORMATS`. None: outputs are answers and nothing else."""
        if tokenizer is None or name == NONE:
            return None
        if name != AUTO:
            return REASONING_FORMATS[name](tokenizer)
        template = tokenizer.chat_template
        return next((kind(tokenizer) for kind in REASONING_FORMATS.values() if kind.shown_in(template)), None)

    @classmethod
    @abstractmethod
    def shown_in(cls, template: str) -> bool:
        """The chat template writes the marks, or looks for them."""

    @abstractmethod
    def thinking(self, prompt: Sequence[int]) -> Thinking:
        """prompt: token ids of the whole conversation, whose end may have begun a thought, or closed it."""


class ChannelFormat(ReasoningFormat):
    """`channels`."""

    name = "openai"

    @classmethod
    def shown_in(cls, template: str) -> bool:
        return channels.CHANNEL in template and channels.MESSAGE in template

    def __init__(self, tokenizer: Tokenizer) -> None:
        start, channel, message = (_name(tokenizer, mark) for mark in (channels.START, channels.CHANNEL, channels.MESSAGE))
        text, rule = _up_to(channels.END, tokenizer)
        thoughts = f'thoughts: ({channel} "{channels.ANALYSIS}" {message} {text} {start} "assistant")*\n{rule}'
        final = f'preamble: thoughts {channel} "final" {message}\n{thoughts}'
        calls = f'preamble: thoughts ({channel} "final" {message})?\n{thoughts}'
        self._thinking = Thinking(ChannelParser, tokenizer, final, calls)

    def thinking(self, prompt: Sequence[int]) -> Thinking:  # noqa: ARG002
        return self._thinking


class ThinkFormat(ReasoningFormat):
    """`think`. What a template is told (`enable_thinking`, and its like) is seen by what it has written at the prompt's end."""

    name = "think"

    @classmethod
    def shown_in(cls, template: str) -> bool:
        return any(mark in template for mark in THINK_MARKS)

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        begin, (text, rule) = _name(tokenizer, think.BEGIN), _up_to(think.END, tokenizer)
        rest = f"{text} /[\\x20\\t\\r\\n]{{0,4}}/"
        opened, open_to_it = f"preamble: {begin}? {rest}\n{rule}", f"preamble: ({begin} {rest})?\n{rule}"
        self._opened = Thinking(partial(ThinkParser, opened=True), tokenizer, opened, opened)
        self._open_to_it = Thinking(partial(ThinkParser, opened=False), tokenizer, open_to_it, open_to_it)
        self._closed = Thinking(AnswerOnly, tokenizer, "", "")

    def thinking(self, prompt: Sequence[int]) -> Thinking:
        tail = self._tokenizer.decode(prompt[-TAIL_TOKENS:]).rstrip(BLANKS)
        if tail.endswith(think.END):
            return self._closed
        return self._opened if tail.endswith(think.BEGIN) else self._open_to_it


REASONING_FORMATS: dict[str, type[ReasoningFormat]] = {kind.name: kind for kind in (ChannelFormat, ThinkFormat)}


def _name(tokenizer: Tokenizer, mark: str) -> str:
    """The mark in Lark: a token of the vocabulary by itself, or its text."""
    return mark if tokenizer.token_id(mark) is not None else f'"{mark}"'


def _up_to(mark: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """Any text with the mark at its end, in Lark, and the rule that it names. The mark cannot be spelled where it is a token:
    who reads the text would take that for the end, and the grammar would not."""
    if tokenizer.token_id(mark) is None:
        return "text", f'text[suffix="{mark}"]: /(?s:.*)/'
    spelled = re.escape(mark).replace("/", "\\/")
    return f"TEXT {mark}", f"TEXT: /(?s:.*)/ & ~/(?s:.*){spelled}(?s:.*)/"

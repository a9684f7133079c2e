"""What a family's syntax must say of itself: marks, how a call is read, and the rules of a grammar for it.

Imports the reader of pieces and the events; not what else is known of a request.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deploy.doors.dialects.tools.events import Events
from deploy.doors.dialects.tools.pieces import Feed, Reading

SPACE = re.compile(r"\s*")
FUNCTION_NAME = re.compile(r"[\w.-]*")


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """What the rules of calls are made of.

    schemas: of the functions that may be called, by name, as the compiler follows them. unenforced: is told of a function and
    of what in its schema the syntax leaves unenforced. tokens: marks that are single tokens of the vocabulary, which a grammar
    must name by their ids. parallel: several calls at once are allowed.
    """

    schemas: Mapping[str, Mapping[str, Any]]
    unenforced: Callable[[str, str], None]
    tokens: Mapping[str, int]
    parallel: bool

    def text(self, text: str) -> str:
        """In Lark: a text in which marks may stand."""
        if not text:
            return ""
        mark = next((mark for mark in sorted(self.tokens, key=len, reverse=True) if mark in text), None)
        if mark is None:
            return json.dumps(text, ensure_ascii=False)
        before, _, after = text.partition(mark)
        return " ".join(filter(None, (self.text(before), f"<[{self.tokens[mark]}]>", self.text(after))))

    def text_up_to(self, end: str, rule: str) -> tuple[str, list[str]]:
        """In Lark: any text and the mark that ends it, as a rule of this name; what refers to it, and the rules."""
        if end in self.tokens:
            spelled = _in_regex(end)  # whoever reads the text would take it for the end
            return f"{rule.upper()} {self.text(end)}", [f"{rule.upper()}: /(?s:.*)/ & ~/(?s:.*){spelled}(?s:.*)/"]
        return rule, [f"{rule}[lazy]: /(?s:.*){_in_regex(end)}/"]


def _in_regex(text: str) -> str:
    """Between slashes, on one line."""
    return re.escape(text).replace("\\\n", "\\n").replace("/", "\\/")


@dataclass(frozen=True, slots=True)
class ToolFormat(ABC):
    """How the models of a family write calls.

    name: as an option names it. begins: marks with which a call may begin anywhere in a text; empty where calls are the whole
    output, before which one of `prefixes` may stand. gap: white space that templates write between an answer and a call.
    open, join, close: what a model writes before, between and after the calls of one output; join: None where it makes but one.
    """

    name: str
    begins: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    gap: str = ""
    open: str = ""
    join: str | None = ""
    close: str = ""
    marks: tuple[str, ...] = ()
    """What may be single tokens of the vocabulary."""

    @abstractmethod
    def read(self, mark: str, feed: Feed, events: Events) -> Reading[bool]:
        """Reads a call with its end, or several in a row. mark: one of `begins`, which has just been read. The feed is `kept`,
        and no longer once a call has been told. False: it is none, and nothing of it has been told."""

    @abstractmethod
    def head(self, name: str, grammar: CallGrammar) -> str:
        """In Lark: what stands before a call's arguments."""

    @abstractmethod
    def tail(self, grammar: CallGrammar) -> str:
        """In Lark: what stands behind them."""

    def arguments(self, rule: str, name: str, grammar: CallGrammar) -> list[str]:
        """In Lark: the arguments of one function, as rules of which the first is called `rule`."""
        return [f"{rule}: %json {json.dumps(grammar.schemas[name])}"]

    def rules(self, grammar: CallGrammar) -> str:
        """In Lark: the rule `calls`. Each function's arguments are a schema of their own, so that references in it hold."""
        more = f"({grammar.text(self.join)} call)*" if grammar.parallel and self.join is not None else ""
        numbers = range(len(grammar.schemas))
        lines = [
            f"calls: {grammar.text(self.open)} call {more} {grammar.text(self.close)}",
            f"call: {' | '.join(f'call_{at}' for at in numbers)}",
        ]
        for at, name in enumerate(grammar.schemas):
            lines.append(f"call_{at}: {self.head(name, grammar)} arguments_{at} {self.tail(grammar)}")
            lines += self.arguments(f"arguments_{at}", name, grammar)
        return "\n".join(lines)


def tell_object(feed: Feed, events: Events) -> Reading[None]:
    """Tells an object of JSON as it comes, up to the brace that closes it. The call has begun."""
    feed.kept, waiting = False, True
    reading = feed.nested()
    while waiting:
        begin = feed.at
        waiting = next(reading, False) is None
        events.tell(feed.text[begin : feed.at])
        if waiting:
            yield

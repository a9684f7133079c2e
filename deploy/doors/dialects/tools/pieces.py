"""Text that arrives in pieces, and readers of JSON in it that wait where they need more.

Written with generators, so that a reader is as simple as if all the text were there.
"""

import json
import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from deploy.text.stops import overlap

T = TypeVar("T")
Reading = Generator[None, None, T]
"""A reader: it yields where it needs more text, and returns what it read."""

_SPACE = re.compile(r"\s*")
_SCALAR = re.compile(r"[-+.\w]*")
_STRING_SIGN = re.compile(r'["\\]')
_NESTING_SIGN = re.compile(r'["{}\[\]]')


class Feed:
    """The text, how far it has been read, and the readers.

    at: what is before it has been read. kept: that may be asked for again, so nothing is cut off, and positions stay valid.
    ended: no more will come.
    """

    __slots__ = ("at", "ended", "kept", "text")

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.kept = False
        self.ended = False

    def add(self, text: str) -> None:
        if not self.kept:
            self.text, self.at = self.text[self.at :], 0
        self.text += text

    def take_to(self, end: int) -> str:
        """What is unread before `end`."""
        begin, self.at = self.at, end
        return self.text[begin:end]

    def peek(self) -> Reading[str]:
        """The next character, not read; empty at the end."""
        while self.at == len(self.text) and not self.ended:
            yield
        return self.text[self.at : self.at + 1]

    def take(self, word: str) -> Reading[bool]:
        """Reads the word if it comes next."""
        while True:
            there = self.text[self.at : self.at + len(word)]
            if there == word:
                self.at += len(word)
                return True
            if self.ended or not word.startswith(there):
                return False
            yield

    def take_behind_space(self, word: str) -> Reading[bool]:
        """Reads white space and the word behind it, if that comes; else nothing."""
        behind, kept = self.at, self.kept
        self.kept = True
        yield from self.skip(_SPACE)
        found = yield from self.take(word)
        self.at, self.kept = self.at if found else behind, kept
        return found

    def matching(self, kind: re.Pattern[str]) -> Reading[str]:
        """Reads what matches, however long, and returns it. Needs `kept`."""
        begin = self.at
        yield from self.skip(kind)
        return self.text[begin : self.at]

    def before(self, ends: Sequence[str], hand_on: Callable[[str], None]) -> Reading[str]:
        """Reads up to the first of the ends, hands on what is before it as it comes, and reads and returns that end; empty if
        none comes."""
        kind = re.compile("|".join(map(re.escape, sorted(ends, key=len, reverse=True))))
        while True:
            if match := kind.search(self.text, self.at):
                hand_on(self.take_to(match.start()))
                self.at = match.end()
                return match[0]
            rest = self.text[self.at :]
            hand_on(self.take_to(len(self.text) - (0 if self.ended else max(overlap(rest, end) for end in ends))))
            if self.ended:
                return ""
            yield

    def skip(self, kind: re.Pattern[str]) -> Reading[None]:
        """Reads what matches, however long. kind: matches the empty string too."""
        while True:
            match = kind.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text) or self.ended:
                return
            yield

    def value(self) -> Reading[str]:
        """A JSON value as it is written; empty if something else comes. Needs `kept`."""
        begin = self.at
        match (yield from self.peek()):
            case "{" | "[":
                whole = yield from self.nested()
            case '"':
                whole = (yield from self.string()) is not None
            case _:
                whole = True
                yield from self.skip(_SCALAR)
        return self.text[begin : self.at] if whole else ""

    def string(self) -> Reading[str | None]:
        """What a JSON string says; None if something else comes. Needs `kept`."""
        begin = self.at
        if not (yield from self.take('"')):
            return None
        while (yield from self.next(_STRING_SIGN)) == "\\":
            yield from self.skip_one()
        try:
            return str(json.loads(self.text[begin : self.at], strict=False))
        except ValueError:
            return None

    def nested(self) -> Reading[bool]:
        """An object or an array up to the bracket that closes it; `at` moves along. False: the text ended before that."""
        depth, quoted = 0, False
        while True:
            match (yield from self.next(_STRING_SIGN if quoted else _NESTING_SIGN)):
                case "":
                    return False
                case '"':
                    quoted = not quoted
                case "\\":
                    yield from self.skip_one()
                case "{" | "[":
                    depth += 1
                case _:
                    depth -= 1
                    if not depth:
                        return True

    def next(self, kind: re.Pattern[str]) -> Reading[str]:
        """Reads up to and including the next sign; empty if there is none."""
        while True:
            if match := kind.search(self.text, self.at):
                self.at = match.end()
                return match[0]
            self.at = len(self.text)
            if self.ended:
                return ""
            yield

    def skip_one(self) -> Reading[None]:
        """What a backslash escapes, of which the first character is enough: no other could end the string."""
        if (yield from self.peek()):
            self.at += 1

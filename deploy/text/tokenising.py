"""Where text becomes tokens, and tokens text: in threads beside the event loop, a bounded number at once.

Long texts have threads of their own, so that a short one waits for short ones only. What waits is a request's body, which is
there anyway. Imports the types of prompts.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from deploy.text.content import Content, Conversation, TextPair

LONG_CHARACTERS = 8192
SHORT_AT_ONCE, LONG_AT_ONCE = 4, 2

T = TypeVar("T")


class Tokenising:
    """The threads of one service. They end with it."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(SHORT_AT_ONCE, "manta-tokenise")
        self._long = ThreadPoolExecutor(LONG_AT_ONCE, "manta-tokenise-long")

    async def run(self, work: Callable[[], T], *, long: bool) -> T:
        """What `work` returns, or raises. Work that nobody waits for any more is not begun."""
        return await asyncio.get_running_loop().run_in_executor(self._long if long else self._short, work)


def is_long(content: Content | Sequence[int]) -> bool:
    """Whether it holds more than `LONG_CHARACTERS` of text or as many parts. Looks at no more of it than that."""
    left = LONG_CHARACTERS
    parts: list[Any] = [content]
    if isinstance(content, Conversation):
        parts = [content.messages, content.tools, content.template_kwargs]
    elif isinstance(content, TextPair):
        parts = [content.first, content.second]
    while parts and left >= 0:
        part = parts.pop()
        left -= len(part) if isinstance(part, str | Mapping | list | tuple) else 1
        if left >= 0 and isinstance(part, Mapping):
            parts += [*part.keys(), *part.values()]
        elif left >= 0 and isinstance(part, list | tuple):
            parts += part
    return left < 0

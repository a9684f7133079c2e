"""Which tokens of an output are thought, and which are answer: the same readers, over the tokens' bytes.

Text may lag behind its tokens, so it cannot say. Imports the sections and the tokenizer.
"""

from collections.abc import Iterable
from typing import Generic, TypeVar

from deploy.doors.dialects.reasoning.sections import Place, ReasoningParser
from deploy.text.tokenizer import Tokenizer

T = TypeVar("T")


class TokenSorter(Generic[T]):
    """Sorts the tokens of one choice, each with what belongs to it.

    A token counts as thought if the output is in a thought with it, or was before it: the marks around a thought count. It is
    the answer's if the output is in the answer with it. Others are neither.
    """

    def __init__(self, parser: ReasoningParser, tokenizer: Tokenizer) -> None:
        self._parser = parser
        self._tokenizer = tokenizer
        self._undecided: list[T] = []
        self.thought_tokens = 0

    def push(self, tokens: Iterable[tuple[int, T]]) -> list[T]:
        """Takes the next tokens; returns what belongs to those of the answer that are certain now."""
        answer: list[T] = []
        for token, item in tokens:
            before = self._parser.place
            if not self._parser.settled:  # bytes as characters of their own: marks and white space are ASCII in both
                self._parser.push(self._tokenizer.token_bytes(token).decode("latin-1"))
            self._sort(item, before, answer)
        return answer

    def flush(self) -> list[T]:
        """The output has ended."""
        self._parser.flush()
        answer: list[T] = []
        self._decide(answer)
        return answer

    def _sort(self, item: T, before: Place, answer: list[T]) -> None:
        after = self._parser.place
        if after is Place.BETWEEN:
            self._undecided.clear()
            self.thought_tokens += before is Place.THOUGHT
            return
        self._undecided.append(item)
        if after is not Place.UNDECIDED:
            self._decide(answer)

    def _decide(self, answer: list[T]) -> None:
        match self._parser.place:
            case Place.THOUGHT:
                self.thought_tokens += len(self._undecided)
            case Place.ANSWER:
                answer += self._undecided
        self._undecided = []

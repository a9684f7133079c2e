"""Who waits for which running sequence to have computed how much.

Imports `sequence`.
"""

from scheduler.sequence import Sequence

WHOLE_PROMPT = 1 << 62
"""More blocks than any prompt has: whoever waits for them waits for the end of the author's prompt."""


class Awaited:
    """authors: by the sequence that computes, those who wait for it, each with the number of full blocks that it needs.

    No cycle: only sequences with blocks are waited for, and one that gives them up withdraws.
    """

    def __init__(self) -> None:
        self.authors: dict[Sequence, list[tuple[int, Sequence]]] = {}

    def wait(self, sequence: Sequence, author: Sequence, blocks: int) -> None:
        self.authors.setdefault(author, []).append((blocks, sequence))

    def published(self, author: Sequence, blocks: int) -> list[Sequence]:
        """`author`, for whom somebody waits, has computed so many full blocks of its prompt. Returns who needs no more."""
        waiters = self.authors.pop(author)
        if left := [waiter for waiter in waiters if waiter[0] > blocks]:
            self.authors[author] = left
        return [sequence for needed, sequence in waiters if needed <= blocks]

    def waiters(self) -> list[Sequence]:
        """All that wait, for the invariants."""
        return [sequence for waiters in self.authors.values() for _, sequence in waiters]

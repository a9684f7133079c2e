"""Who has no lease: the queue by age, those behind a prefix that is being computed, those too large for the groups that are up.

Imports `prefixes` and `sequence`. Decides nothing: the core asks for the oldest and says what became of it.
"""

import heapq
from collections.abc import Iterable
from collections.abc import Sequence as Listing

from scheduler.prefixes import PendingPrefixes
from scheduler.sequence import Sequence, State


class WaitingRoom:
    """Strictly by age: a sequence that comes back takes the place that its number gives it.

    queue: a heap; sequences that ended while they waited stay in it until they come up. parked: they fit no group that is up,
    only one that is expected. Invariant: a WAITING sequence is in `queue` or `parked`, once; a DEFERRED one in `prefixes`.
    count, tokens: all of them, and their tokens; `enter` and `leave` are called once for each stay.
    """

    def __init__(self) -> None:
        self.queue: list[Sequence] = []
        self.parked: list[Sequence] = []
        self.prefixes = PendingPrefixes()
        self.count = 0
        self.tokens = 0

    def enter(self, sequence: Sequence) -> None:
        """A newcomer, or one that has lost its lease."""
        self.count += 1
        self.tokens += sequence.committed
        self.join([sequence])

    def leave(self, sequence: Sequence) -> None:
        """It has ended while it waited, or got its pages: then it is the oldest, and the queue moves up."""
        self.count -= 1
        self.tokens -= sequence.committed
        if sequence.blocks is not None:
            heapq.heappop(self.queue)

    def join(self, sequences: Iterable[Sequence]) -> None:
        """Into the queue. One that has ended stays ended."""
        for sequence in sequences:
            if sequence.state is not State.ENDED:
                sequence.state = State.WAITING
                heapq.heappush(self.queue, sequence)

    def oldest(self, largest_pool: int) -> Sequence | None:
        """Whose turn it is, None if nobody waits. Parks those that need more pages than the largest pool that is up has."""
        while self.queue:
            sequence = self.queue[0]
            if sequence.state is State.WAITING and sequence.pages_at_most <= largest_pool:
                return sequence
            heapq.heappop(self.queue)
            if sequence.state is State.WAITING:
                self.parked.append(sequence)
        return None

    def defer(self, hashes: Listing[int]) -> bool:
        """Lets the oldest wait if a running sequence is about to compute the pages that continue its cached prefix."""
        shared = self.prefixes.shared(hashes)
        if shared is None:
            return False
        sequence = heapq.heappop(self.queue)
        sequence.state = State.DEFERRED
        self.prefixes.wait(sequence, shared)
        return True

    def published(self, author: Sequence, hash_: int) -> None:
        """Whoever waited for this page comes back."""
        self.join(self.prefixes.published(author, hash_))

    def withdraw(self, author: Sequence) -> None:
        """`author` runs no more: whoever waited for its pages comes back."""
        self.join(self.prefixes.withdraw(author))

    def unpark(self) -> None:
        """The groups have changed."""
        parked, self.parked = self.parked, []
        self.join(parked)

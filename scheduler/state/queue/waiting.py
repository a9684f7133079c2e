"""Who has no lease: the queue, those behind a prefix in the making, those too large for the groups that are up.

Imports `config`, `fairness`, `pace` and `sequence`. Says whose turn it is; whether there is room, others know.
"""

import heapq
from collections.abc import Iterable
from collections.abc import Sequence as Listing

from scheduler.config.core import CoreConfig
from scheduler.state.counters import Counters
from scheduler.state.queue.fairness import FairQueue
from scheduler.state.queue.pace import QueuePace
from scheduler.state.sequence import Sequence, State

ByAge = tuple[float, int, int, Sequence]
"""entered_s, place, ticket: two waits of one sequence differ in their tickets."""


class WaitingRoom:
    """The order: every second start belongs to whoever has waited `age_s` or longer, the longest first; all others go by
    priority, tenant and age (`FairQueue`). Every second, because a tenant that floods the queue has the longest waits too.

    Nobody starves: a sequence that fits some group starts within

        age_s + 2 * (older + 1) * (skip_s + longest)

    seconds, where `older` counts those that have waited longer, and `longest` is the longest that anyone who runs still does.
    For then at least every second start is of one of these, and the first of them waits no longer than until others may not
    pass it any more and until those who run have ended. A prefix that is being computed can add the time that this takes.

    parked: they fit no group that is up, only one that is expected. apart: the suspects, who get a group to themselves, and the
    wary, who join the queue once it is known which groups live.
    Invariant: a WAITING sequence is either queued, once, under its `ticket`, or in `parked`, or in `apart`; a DEFERRED one is
    among the `waiters` of `Prefixes`. count, tokens: all of them, and their tokens; `enter` and `leave` are called once for
    each stay. rooms: grows whenever somebody might fit who did not before.
    """

    def __init__(self, config: CoreConfig, counters: Counters) -> None:
        self.fair = FairQueue()
        self.aged: list[ByAge] = []
        self.parked: list[Sequence] = []
        self.apart: list[Sequence] = []
        self.pace = QueuePace()
        self.count = 0
        self.tokens = 0
        self.rooms = 0
        self._changes = 0  # of the queue or of the room
        self._by_age: list[ByAge] = []  # the queued, but for the aged; and void entries
        self._settled = -1
        self._tickets = 0
        self._aged_last = False  # the last start was of an aged one
        self._aged_next = False
        self._config = config
        self._counters = counters

    # ---- a stay

    def enter(self, sequence: Sequence, now_s: float) -> None:
        """A newcomer, or one that has lost its lease: then its tenant is charged for what it was served."""
        sequence.charge(sequence.committed)
        sequence.entered_s, sequence.passed_s, sequence.aged, sequence.needs = now_s, None, False, 0
        self.count += 1
        self.tokens += sequence.committed
        if self.count == 1:
            self.pace.begin(now_s)
        self.fair.enter(sequence)
        if sequence.apart:
            sequence.state = State.WAITING
            self.apart.append(sequence)
        else:
            self.join([sequence])

    def leave(self, sequence: Sequence, now_s: float) -> None:
        """It has ended while it waited, or got its blocks."""
        self.count -= 1
        self.tokens -= sequence.committed
        sequence.ticket = 0
        if sequence.apart:
            self.apart.remove(sequence)
        self.fair.leave(sequence)
        if sequence.blocks is not None:
            self._aged_last = sequence.aged
            if now_s > sequence.entered_s:
                self.pace.count(sequence.committed, now_s)
        else:
            self._changes += 1  # it may have been the one for which room was kept
        if not self.count:
            self.pace.end(now_s)

    def join(self, sequences: Iterable[Sequence]) -> None:
        """Into the queue. One that has ended stays ended."""
        for sequence in sequences:
            if sequence.state is not State.ENDED:
                sequence.state = State.WAITING
                self._tickets += 1
                sequence.ticket = self._tickets
                sequence.tried = -1
                self._changes += 1
                self._queue(sequence)
                if not sequence.aged:
                    heapq.heappush(self._by_age, (sequence.entered_s, sequence.place, sequence.ticket, sequence))

    # ---- a turn: `begin`, `take` until nobody is left or enough have been asked, `put_back`

    def settled(self) -> bool:
        """Nothing has happened since the last turn that could let anyone start."""
        return self._settled == self._changes

    def begin(self, now_s: float) -> None:
        """Who has waited too long goes first from now on."""
        self._aged_next = not self._aged_last
        while self._by_age and (self._by_age[0][0] <= now_s - self._config.queue_age_s or _is_void(self._by_age[0])):
            entry = heapq.heappop(self._by_age)
            if not _is_void(entry):
                sequence = entry[3]
                self._tickets += 1
                sequence.ticket, sequence.aged = self._tickets, True  # which takes it out of the fair queue
                self._queue(sequence)
                self._counters.aged += 1

    def take(self, largest_pool: int) -> Sequence | None:
        """Takes out whose turn it is, None if nobody is left. Parks those that need more blocks than the largest pool has."""
        while True:
            sequence = (self._oldest() or self.fair.pop()) if self._aged_next else (self.fair.pop() or self._oldest())
            if sequence is None or sequence.blocks_at_once <= largest_pool:
                self._aged_next = not self._aged_next
                return sequence
            sequence.ticket = 0
            self.parked.append(sequence)

    def may_be_passed(self, sequence: Sequence, now_s: float, *, first: bool) -> bool:
        """It found no room. May those behind it start? Not for ever, once it was the first."""
        if first and sequence.passed_s is None:
            sequence.passed_s = now_s
        return sequence.passed_s is None or now_s - sequence.passed_s < self._config.queue_skip_s

    def put_back(self, sequences: Iterable[Sequence], *, settled: bool) -> None:
        """They did not start. settled: nobody else could have, either, as things are."""
        for sequence in sequences:
            self._queue(sequence)
        if settled:
            self._settled = self._changes

    def defer(self, sequence: Sequence) -> None:
        """One that was taken out waits for a prefix in the making, until it may `join` again."""
        sequence.state, sequence.ticket = State.DEFERRED, 0

    # ---- what happens elsewhere

    def made_room(self, back: Listing[Sequence] = ()) -> None:
        """Somebody may fit who did not before. back: who waited for something else until now."""
        self.rooms += 1
        self._changes += 1
        if back:
            self.join(back)

    def unpark(self) -> None:
        """The groups have changed."""
        parked, self.parked = self.parked, []
        self.made_room(parked)

    def queued(self) -> list[Sequence]:
        """All whose turn may come, for the invariants."""
        return [*self.fair.queued(), *(entry[3] for entry in self.aged if not _is_void(entry))]

    def _queue(self, sequence: Sequence) -> None:
        if sequence.aged:
            heapq.heappush(self.aged, (sequence.entered_s, sequence.place, sequence.ticket, sequence))
        else:
            self.fair.push(sequence)

    def _oldest(self) -> Sequence | None:
        while self.aged:
            entry = heapq.heappop(self.aged)
            if not _is_void(entry):
                return entry[3]
        return None


def _is_void(entry: ByAge) -> bool:
    return entry[3].ticket != entry[2]

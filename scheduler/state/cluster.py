"""What the scheduler knows: every group, every sequence, the global block table. Shared by those who decide.

    placement.intake     a request becomes sequences, or is refused
    core                 the calls that come from outside: groups, front ends, reports
    placement.admission  a waiting one starts: match, wait for a prefix or not, route, reserve; one that runs is placed anew
    leases               a running one fills blocks, publishes them, gets more, or gives them up

Imports the data that it holds; decides nothing.
"""

import itertools
import math
import random
from typing import NamedTuple

from kvcache.ids import GroupId
from kvcache.table import BlockTable
from scheduler.config.core import CoreConfig, QueueBounds, Resolved
from scheduler.state.counters import Counters
from scheduler.state.outbox import Outbox
from scheduler.state.prefixes import Prefixes
from scheduler.state.queue.deadlines import Deadlines
from scheduler.state.queue.pace import Pace
from scheduler.state.queue.waiting import WaitingRoom
from scheduler.state.recall import Recall
from scheduler.state.resident import ResidentGroup, Watch
from scheduler.state.sequence import Sequence
from scheduler.state.transfers import Transfers
from scheduler.state.window import Window


class Rest(NamedTuple):
    """Of a group that has died too often. blocks: of its pool, 0 if unknown. back_at_s: when it is tried again."""

    blocks: int
    back_at_s: float


class ClusterState:
    """Mutated by the core and those that it asks to decide alone, one call at a time.

    now_s: when the event that is being handled happened, by the shell's clock. expected: groups that are coming up, with
    their blocks, 0 if unknown. resting: those that are tried again later, and not expected until then. largest_up: blocks of
    the largest pool that is up. largest: of the largest pool that is up or expected; 0 without any, None while one of unknown
    size is expected. largest_later: likewise, those that rest included. longest, longest_later: blocks that bound the length
    of a sequence then: as many, unless no sequence ever holds as many at once. computed: tokens that were computed lately.
    lost: why the last group went that is not expected. numbers: of sequences. random: draws the seeds of requests that bring
    none. window: None where some layer sees all that came before. narrow: of the others then, if there are
    any: they have pools of their own (`kvcache.ids.NARROW`), and a sequence has blocks in both.
    """

    def __init__(self, config: CoreConfig, resolved: Resolved, bounds: QueueBounds | None) -> None:
        self.config, self.resolved, self.bounds = config, resolved, bounds
        self.block_size, self.stride = config.block_size, config.stride
        self.now_s = 0.0
        self.window = Window.of(resolved, config.block_size)
        self.narrow = Window.of_narrow(resolved, config.block_size)
        seen = [None if window is None else window.seen for window in (self.window, self.narrow)]
        self.table = BlockTable(config.block_size, config.stride, *seen)
        self.groups: dict[GroupId, ResidentGroup] = {}
        self.expected: dict[GroupId, int] = {}
        self.resting: dict[GroupId, Rest] = {}
        self.sequences: dict[tuple[int, int], Sequence] = {}
        self.deadlines = Deadlines(self.sequences)
        self.counters = Counters()
        self.waiting = WaitingRoom(config, self.counters)
        self.prefixes = Prefixes(config, self.table, self.groups)
        self.transfers = Transfers(self.table, self.groups, self.counters)
        self.recall = Recall()
        self.outbox = Outbox()
        self.watch = Watch()
        self.computed = Pace()
        self.lost = ""
        self.numbers = itertools.count()
        self.random = random.Random(config.seed)
        self.pools_changed()

    def pools_changed(self) -> None:
        """A group has come or gone, or is expected now, or rests, or not any more."""
        self.largest_up = max((group.blocks for group in self.groups.values()), default=0)
        expected, resting = [*self.expected.values()], [rest.blocks for rest in self.resting.values()]
        self.largest = None if 0 in expected else max([self.largest_up, *expected])
        self.largest_later = None if 0 in expected + resting else max([self.largest_up, *expected, *resting])
        self.longest, self.longest_later = self._longest(self.largest), self._longest(self.largest_later)

    def _longest(self, largest: int | None) -> int | None:
        endless = self.window is not None and largest is not None and largest >= self.window.most
        return None if endless else largest

    def rests_s(self, blocks: int) -> float:
        """Until a group that rests, and may have so many blocks, is tried again: the first of them; inf without one."""
        back_at_s = (rest.back_at_s for rest in self.resting.values() if rest.blocks >= blocks or not rest.blocks)
        return max(0.0, min(back_at_s, default=math.inf) - self.now_s)

    def group_of(self, sequence: Sequence) -> ResidentGroup | None:
        return self.groups.get(sequence.blocks.group) if sequence.blocks is not None else None

    def output_of(self, sequence: Sequence) -> int:
        """Its committed tokens of output, wherever it is."""
        group = self.group_of(sequence)
        if group is None or sequence.lease is None:
            return sequence.committed - sequence.prompt_tokens
        return group.length.item(sequence.row) - sequence.prompt_tokens  # that in the ring included

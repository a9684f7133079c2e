"""What the scheduler knows: every group, every sequence, the global block table. Shared by those who decide.

    placement.intake     a request becomes sequences, or is refused
    core                 the calls that come from outside: groups, front ends, reports
    placement.admission  a waiting one starts: match, wait for a prefix or not, route, reserve; one that runs is placed anew
    leases               a running one fills blocks, publishes them, gets more, or gives them up

Imports the data that it holds; decides nothing.
"""

import itertools
import random

from kvcache.ids import GroupId
from kvcache.table import BlockTable
from scheduler.config.core import CoreConfig, QueueBounds, Resolved
from scheduler.state.counters import Counters
from scheduler.state.deadlines import Deadlines
from scheduler.state.outbox import Outbox
from scheduler.state.pace import Pace
from scheduler.state.prefixes import Prefixes
from scheduler.state.resident import ResidentGroup, Watch
from scheduler.state.sequence import Sequence
from scheduler.state.transfers import Transfers
from scheduler.state.waiting import WaitingRoom
from scheduler.state.window import Window


class ClusterState:
    """Mutated by the core and those that it asks to decide alone, one call at a time.

    now_s: when the event that is being handled happened, by the shell's clock. expected: groups that are coming up, with
    their blocks, 0 if unknown. largest_up: blocks of the largest pool that is up. largest: of the largest pool; 0 without any
    group, None while one of unknown size is expected. longest: blocks that bound the length of a sequence: those of the largest
    pool, unless no sequence ever holds as many at once. computed: tokens that were computed lately. lost: why the last group
    went that is not expected; back_at_s: when that is tried again, if it is. numbers: of sequences. random: draws the seeds of
    requests that bring none. window: None where some layer sees all that came before. narrow: of the others then, if there are
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
        self.sequences: dict[tuple[int, int], Sequence] = {}
        self.deadlines = Deadlines(self.sequences)
        self.counters = Counters()
        self.waiting = WaitingRoom(config, self.counters)
        self.prefixes = Prefixes(config, self.table, self.groups)
        self.transfers = Transfers(self.table, self.groups, self.counters)
        self.outbox = Outbox()
        self.watch = Watch()
        self.computed = Pace()
        self.lost, self.back_at_s = "", 0.0
        self.numbers = itertools.count()
        self.random = random.Random(config.seed)
        self.pools_changed()

    def pools_changed(self) -> None:
        """A group has come or gone, or is expected now, or not any more."""
        self.largest_up = max((group.blocks for group in self.groups.values()), default=0)
        expected = self.expected.values()
        self.largest = None if 0 in expected else max([self.largest_up, *expected])
        endless = self.window is not None and self.largest is not None and self.largest >= self.window.most
        self.longest = None if endless else self.largest

    def group_of(self, sequence: Sequence) -> ResidentGroup | None:
        return self.groups.get(sequence.blocks.group) if sequence.blocks is not None else None

    def output_of(self, sequence: Sequence) -> int:
        """Its committed tokens of output, wherever it is."""
        group = self.group_of(sequence)
        if group is None or sequence.lease is None:
            return sequence.committed - sequence.prompt_tokens
        return group.length.item(sequence.row) - sequence.prompt_tokens  # that in the ring included

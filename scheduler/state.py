"""What the scheduler knows: every group, every sequence, the global block table. Shared by the parts that decide.

    core       the calls that come from outside: groups, front ends, reports
    intake     a request becomes sequences, or is refused
    sharing    what a waiting one has in common with those who run: shown, or waited for
    admission  a waiting one starts: match, route, pin, reserve
    routing    where it could go, and which way is the cheapest
    paging     a running one fills blocks, publishes them, gets more, or gives them up
    relief     before it has to, it goes elsewhere, or what it has is kept

Imports the data that it holds; decides nothing.
"""

from kvcache.ids import GroupId
from kvcache.table import BlockTable
from scheduler.config import CoreConfig, Counters, QueueBounds, Resolved
from scheduler.placement.columns import GroupColumns
from scheduler.placement.open_blocks import OpenBlocks
from scheduler.placement.why import Tell
from scheduler.protocol.messages import ROW_MASK, Failure, FinishReason
from scheduler.queue.deadlines import Deadlines
from scheduler.queue.limits import blocks_for
from scheduler.queue.pace import Pace
from scheduler.queue.waiting import WaitingRoom
from scheduler.running.rates import Rates
from scheduler.running.resident import ResidentGroup, Watch
from scheduler.sequence import Sequence, State
from scheduler.server.outbox import Outbox


class ClusterState:
    """Mutated by the core and its parts alone, one call at a time.

    now_s: when the event that is being handled happened, by the shell's clock. expected: groups that are coming up, with
    their blocks, 0 if unknown. largest_up: blocks of the largest pool that is up. computed: tokens that were computed lately.
    lost: why the last group went for good. explain: who is told of every decision, with its reasons.
    """

    def __init__(self, config: CoreConfig, resolved: Resolved, bounds: QueueBounds | None) -> None:
        self.config, self.resolved, self.bounds = config, resolved, bounds
        self.now_s = 0.0
        self.table = BlockTable(config.block_size, config.stride)
        self.groups: dict[GroupId, ResidentGroup] = {}
        self.expected: dict[GroupId, int] = {}
        self.sequences: dict[tuple[int, int], Sequence] = {}
        self.deadlines = Deadlines(self.sequences)
        self.counters = Counters()
        self.waiting = WaitingRoom(config, self.counters)
        self.open_blocks = OpenBlocks(config.block_size, config.stride, enabled=config.enable_prefix_caching)
        self.outbox = Outbox()
        self.watch = Watch()
        self.columns = GroupColumns(self.table, self.watch)
        self.computed = Pace()
        self.rates = Rates()
        self.lost = ""
        self.explain: Tell | None = None
        self.pools_changed()

    def finish(
        self, sequence: Sequence, reason: FinishReason, output: int, message: str = "", failure: Failure = Failure.FAULT
    ) -> None:
        """The one end of a sequence that holds nothing any more. output: its tokens."""
        if sequence.state in (State.WAITING, State.DEFERRED):
            self.waiting.leave(sequence, self.now_s)
        sequence.charge(sequence.prompt_tokens + output)
        self.waiting.fair.close(sequence.tenant)
        sequence.state = State.ENDED
        del self.sequences[sequence.front_end, sequence.stream]
        self.counters.finished += 1
        self.outbox.finished(sequence, reason, output, message, failure)

    def pools_changed(self) -> None:
        """A group has come or gone, or is expected now, or not any more."""
        self.largest_up = max((group.blocks for group in self.groups.values()), default=0)
        self._unknown = any(blocks == 0 for blocks in self.expected.values())
        self._largest = max([self.largest_up, *self.expected.values()])

    def largest_pool(self) -> int | None:
        """Blocks of the largest pool; 0 without any group; None while a group of unknown size is expected."""
        return None if self._unknown else self._largest

    def blocks_for(self, sequence: Sequence, length: int) -> int:
        """Blocks that hold `length` tokens and the slots granted ahead, no more than the sequence can ever need."""
        return min(blocks_for(length + self.resolved.grant_ahead, self.config.block_size), sequence.blocks_at_most)

    def group_of(self, sequence: Sequence) -> ResidentGroup | None:
        return self.groups.get(sequence.blocks.group) if sequence.blocks is not None else None

    def holder(self, group: ResidentGroup, lease: int) -> Sequence | None:
        """The sequence that still holds `lease`, None if it has ended."""
        sequence = group.sequences[lease & ROW_MASK]
        return sequence if sequence is not None and sequence.lease == lease else None

"""The blocks of those who run: what they fill is published, those who run low get more, somebody may have to give way.

Imports `state`, `victims` and the table.
"""

from operator import attrgetter

from kvcache.table import SequenceBlocks
from scheduler.protocol.messages import Drop, Grant, Remap
from scheduler.queue.awaited import WHOLE_PROMPT
from scheduler.running.host_tier import HostTier
from scheduler.running.resident import ResidentGroup
from scheduler.running.victims import find_victim
from scheduler.sequence import Sequence, State
from scheduler.state import ClusterState

BY_PLACE = attrgetter("place")
"""The order of service, for sorting: quicker than to ask sequences which goes first."""


class Paging:
    """Works on the shared state; has none of its own."""

    def __init__(self, state: ClusterState, host_tier: HostTier) -> None:
        self._state = state
        self._host_tier = host_tier
        self._awaited = state.waiting.awaited.authors
        self._block_size = state.config.block_size
        self._least_part = state.config.stride or state.config.block_size  # tokens; a whole block is no part

    def advance(self, group: ResidentGroup, sequence: Sequence, row: int) -> bool:
        """Looks after a row that is due: publishes what it has filled. Returns whether it runs low."""
        blocks, block_size = sequence.blocks, self._block_size
        assert blocks is not None
        length, pending = group.length.item(row), group.pending.item(row)
        full = (length - pending) // block_size
        if full > len(blocks.nodes):
            sequence.charge(length)
            self._publish(group, sequence, blocks, full)
        if pending == 1 and sequence in self._awaited:
            self._state.waiting.published(sequence, WHOLE_PROMPT)
        return self.schedule(group, sequence, row, length, full)

    def schedule(self, group: ResidentGroup, sequence: Sequence, row: int, length: int, full: int) -> bool:
        """Says when a row is due next: the length at which it fills a block or runs low, while it decodes.

        length: its tokens. full: blocks that it has filled. Returns whether it runs low already.
        """
        assert sequence.blocks is not None
        block_size, blocks = self._block_size, len(sequence.blocks.blocks)
        filled = (full + 1) * block_size + 1
        low = blocks * block_size - self._state.resolved.grant_ahead + 1
        group.due[row] = filled if blocks == sequence.blocks_at_most or filled < low else low
        return length >= low and blocks < sequence.blocks_at_most

    def _publish(self, group: ResidentGroup, sequence: Sequence, blocks: SequenceBlocks, full: int) -> None:
        """Publishes blocks that the committed computation has filled, up to `full`; a twin published first is adopted."""
        block_size, hashes = self._block_size, sequence.hashes
        assert sequence.lease is not None
        group.write_back(sequence, full * block_size)
        if not self._state.config.enable_prefix_caching:
            return
        for index in range(len(blocks.nodes), full):
            content = sequence.content_of(index, block_size)
            hash_ = hashes[index] if index < len(hashes) else sequence.hash_block(content)
            adopted = self._state.table.publish(blocks, content, hash_)
            if adopted is not None:
                group.issue(Remap(sequence.lease, index, adopted))
        self._state.open_blocks.turn_to(sequence, full)
        if sequence in self._awaited:
            self._state.waiting.published(sequence, full)

    def _is_part(self, blocks: SequenceBlocks, tokens: int) -> bool:
        """Whether so many tokens of the block that a sequence fills at the moment are worth to be published.

        What it begins with, if that was copied, is known by the block that it was copied from, until a step has added to it.
        """
        return tokens >= self._least_part and tokens > blocks.inherited

    def extend(self, group: ResidentGroup, needy: list[Sequence]) -> None:
        """Grants blocks to the leases that run low and to the starved, oldest first: it takes from nobody just served."""
        if group.starved:
            needy = list({*group.starved, *needy})
            group.starved.clear()
            group.touch()
        for sequence in sorted(needy, key=BY_PLACE):
            if sequence.state is State.RUNNING:  # neither ended in this report nor the victim of an older one
                self._grant(group, sequence)

    def _grant(self, group: ResidentGroup, sequence: Sequence) -> None:
        """Extends a lease; without a free block a later sequence gives its blocks up, in this same call."""
        assert sequence.blocks is not None
        assert sequence.lease is not None
        length = group.length.item(sequence.row)
        wanted = self._state.blocks_for(sequence, length) - len(sequence.blocks.blocks)
        while (blocks := self._state.table.grow(sequence.blocks, wanted)) is None:
            victim = find_victim(self._state.table, group, sequence)
            if victim is None:
                group.lease_waits += 1
                group.starved.append(sequence)  # its row stays due: the next report tries again
                group.touch()
                return
            self.preempt(group, victim)
        group.issue(Grant(sequence.lease, tuple(blocks)))
        self.schedule(group, sequence, sequence.row, length, group.computed(sequence.row) // self._block_size)

    def preempt(self, group: ResidentGroup, victim: Sequence) -> None:
        """Its blocks are wanted. What it had stays cached as long as it can."""
        self._state.counters.preemptions += 1
        self._state.counters.recomputed_tokens += group.computed(victim.row)
        victim.preemptions += 1
        self.interrupt(group, victim)

    def interrupt(self, group: ResidentGroup, sequence: Sequence) -> None:
        """A running sequence waits again, from its committed tokens on."""
        assert sequence.lease is not None
        group.issue(Drop(sequence.lease))
        group.write_back(sequence)
        self.leave(group, sequence)
        self._state.waiting.enter(sequence, self._state.now_s)

    def leave(self, group: ResidentGroup, sequence: Sequence, *, release: bool = True) -> None:
        """The lease is over: the row and the blocks are given back, what they hold stays cached as long as it can.

        release: not if the group is lost. Tokens that are still needed have been written back.
        """
        assert sequence.blocks is not None
        self._state.open_blocks.close(sequence)
        if release:
            computed = group.computed(sequence.row)
            start = computed // self._block_size * self._block_size
            if self._is_part(sequence.blocks, computed - start):
                self._state.table.publish_tail(sequence.blocks, group.tail(sequence, start, computed).tobytes())
            if group.host_blocks:
                self._host_tier.offload(group, sequence)
            self._state.table.release(sequence.blocks)
        group.unseat(sequence)
        sequence.lease, sequence.row, sequence.blocks = None, -1, None
        self._state.waiting.withdraw(sequence)

"""Blocks on their way from one pool to another, beside the steps: who holds them meanwhile, and what follows when they arrive.

    fetch    a group's blocks to another group   Send to the one, Receive to the other; each answers once: Moved
    offload  a group's blocks to its host memory  Offload; one answer
    load     and back                            Load; one answer

Both ends are pinned until the side that reads or writes them has answered, or is gone.
Imports `state` and the table.
"""

from dataclasses import dataclass

import numpy as np

from kvcache.ids import BlockId, GroupId, host_of, is_host
from kvcache.table import SequenceBlocks
from scheduler.protocol.messages import Cut, LeaseId, Load, Moved, Offload, Receive, Send
from scheduler.running.resident import ResidentGroup
from scheduler.sequence import Sequence
from scheduler.state import ClusterState


@dataclass(slots=True, eq=False)
class Transfer:
    """Blocks of one prefix. Mutated by `Transfers` alone.

    source, target: pools. held: the source's blocks, pinned until they are read; None afterwards. blocks: the target's, pinned
    likewise; its blocks from `first` to `end` arrive. part: tokens that the last of them is filled with, 0 if it is full.
    author: whose tokens they are; it waits for them if `blocks` are its own. known_blocks: of its prefix, held anywhere, then.
    moves: the author follows its blocks when they have arrived, if it still has `lease`.
    """

    number: int
    source: GroupId
    target: GroupId
    author: Sequence
    held: SequenceBlocks | None
    blocks: SequenceBlocks | None
    first: int
    end: int
    part: int
    known_blocks: int
    moves: LeaseId | None = None

    @property
    def tokens_end(self) -> int:
        """Whole blocks that the target has when all have arrived."""
        return self.end - (1 if self.part else 0)

    @property
    def awaited(self) -> bool:
        """The author waits for it: not if it has ended, or restarted elsewhere, meanwhile."""
        return self.blocks is not None and self.author.blocks is self.blocks


class Transfers:
    """Those under way, by number. Its own are the numbers."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state
        self._under_way: dict[int, Transfer] = {}
        self._numbers = 0

    def holders(self) -> list[SequenceBlocks]:
        """The blocks that transfers hold and no sequence does, for the invariants."""
        held = [transfer.held for transfer in self._under_way.values() if transfer.held is not None]
        orphans = [transfer.blocks for transfer in self._under_way.values() if transfer.blocks and not transfer.awaited]
        return [*held, *orphans]

    def under_way(self) -> list[Transfer]:
        return list(self._under_way.values())

    def begin(
        self, author: Sequence, held: SequenceBlocks, blocks: SequenceBlocks, *, part: int = 0, known_blocks: int = 0,
        moves: LeaseId | None = None,
    ) -> None:  # fmt: skip
        """Brings the blocks of `held` that `blocks` has no content for to the same places there."""
        first, end = len(blocks.nodes), len(held.blocks)
        transfer = Transfer(
            self._numbers, held.group, blocks.group, author, held, blocks, first, end, part, known_blocks, moves
        )
        self._numbers += 1
        self._under_way[transfer.number] = transfer
        source, target = self._state.groups.get(held.group), self._state.groups.get(blocks.group)
        read, written = _ids(held.blocks[first:]), _ids(blocks.blocks[first:end])
        if source is not None:
            source.sending += end - first
        if target is not None:
            target.receiving += end - first
        if source is not None and target is not None:
            source.issue(Send(transfer.number, read, target.group, target.epoch))
            target.issue(Receive(transfer.number, written, source.group, source.epoch, source.ports))
        elif source is not None:
            source.issue(Offload(transfer.number, read, written))
        elif target is not None:
            target.issue(Load(transfer.number, read, written))

    def answered(self, group: ResidentGroup, moved: Moved) -> Transfer | None:
        """One side is done. Returns the transfer if its blocks have been written: the caller takes its `blocks` over."""
        transfer = self._under_way.get(moved.transfer)
        if transfer is None:
            return None
        reads = transfer.source == group.group or is_host(transfer.source)
        writes = transfer.target == group.group or is_host(transfer.target)
        blocks = transfer.end - transfer.first
        if reads and transfer.held is not None:
            group.sending -= 0 if is_host(transfer.source) else blocks
            self._state.table.release(transfer.held)
            transfer.held = None
            self._forget(transfer)
        if not writes or transfer.blocks is None:
            return None
        group.receiving -= 0 if is_host(transfer.target) else blocks
        if moved.ok:
            tokens, rates = blocks * self._state.config.block_size, self._state.rates
            if not is_host(transfer.target):
                (rates.load if is_host(transfer.source) else rates.fetch).measured(tokens, moved.elapsed_s)
        return transfer

    def arrived(self, transfer: Transfer) -> None:
        """The target's side is settled."""
        transfer.blocks = None
        self._forget(transfer)

    def group_down(self, group: ResidentGroup) -> None:
        """What was on its way from there will not arrive, as its target is told; what was on its way to it is not sent."""
        gone, others = (group.group, host_of(group.group)), set[GroupId]()
        for transfer in self.under_way():
            if transfer.source in gone:
                transfer.held = None  # void, like everything of the group
                others.add(transfer.target)  # even if the source has answered: that it failed, before it went
            if transfer.target in gone:
                transfer.blocks = None
                others.add(transfer.source)
            self._forget(transfer)
        for other in sorted(others.difference(gone)):
            if other in self._state.groups:
                self._state.groups[other].issue(Cut(group.group, group.epoch))

    def moving(self, sequence: Sequence) -> bool:
        """Its blocks are on their way to where it will go on."""
        return any(transfer.moves == sequence.lease and transfer.author is sequence for transfer in self._under_way.values())

    def _forget(self, transfer: Transfer) -> None:
        """Both sides are done: the number means nothing any more."""
        if transfer.held is None and transfer.blocks is None:
            self._under_way.pop(transfer.number, None)


def _ids(blocks: list[BlockId]) -> bytes:
    return np.array(blocks, np.int32).tobytes()

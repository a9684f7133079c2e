"""Pages on their way from one group to another, beside the steps: who holds them meanwhile, and what follows when they arrive.

    core: place ──▶ begin: pin the source's pages, reserve the target's ──Send──▶ source   each side answers once: Moved
                                                                       ──Receive─▶ target
    both pins last until the side that they are for has answered, or is gone. Then the sequence starts, or computes itself
    what did not arrive.

Imports `state` and the table.
"""

from dataclasses import dataclass

import numpy as np

from kvcache.ids import BlockId, GroupId
from kvcache.table import SequenceBlocks
from scheduler.messages import Cut, Moved, Receive, Send
from scheduler.resident import ResidentGroup
from scheduler.sequence import Sequence
from scheduler.state import ClusterState


@dataclass(slots=True, eq=False)
class Transfer:
    """Pages of one prefix. Mutated by `Transfers` alone.

    source, target: groups. held: the source's pages, pinned until it has answered; None afterwards. blocks: the target's,
    pinned likewise; its pages from `first` to `end` arrive. part: tokens that the last of them is filled with, 0 if it is full.
    author: whose tokens they are; it waits for them if `blocks` are its own. known_pages: of its prefix, held anywhere, then.
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
    known_pages: int

    @property
    def tokens_end(self) -> int:
        """Whole pages that the target has when all have arrived."""
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
        self, author: Sequence, held: SequenceBlocks, blocks: SequenceBlocks, first: int, part: int, known_pages: int
    ) -> None:
        """Sends the pages of `held` from the index `first` on to the same places of `blocks`."""
        groups = self._state.groups
        source, target = groups[held.group], groups[blocks.group]
        end = len(held.blocks)
        transfer = Transfer(
            self._numbers, held.group, blocks.group, author, held, blocks, first, end, part, known_pages
        )
        self._numbers += 1
        self._under_way[transfer.number] = transfer
        source.sending += end - first
        target.receiving += end - first
        source.issue(Send(transfer.number, _ids(held.blocks[first:]), target.group, target.epoch))
        target.issue(
            Receive(transfer.number, _ids(blocks.blocks[first:end]), source.group, source.epoch, source.ports)
        )

    def answered(self, group: ResidentGroup, moved: Moved) -> Transfer | None:
        """One side is done. Returns the transfer if it is the target that says so: the caller takes its `blocks` over."""
        transfer = self._under_way.get(moved.transfer)
        if transfer is None:
            return None
        pages = transfer.end - transfer.first
        if transfer.source == group.group and transfer.held is not None:
            group.sending -= pages
            self._state.table.release(transfer.held)
            transfer.held = None
            self._forget(transfer)
            return None
        if transfer.target != group.group or transfer.blocks is None:
            return None
        group.receiving -= pages
        if moved.ok:
            self._state.rates.fetched(pages * self._state.config.page_size, moved.elapsed_s)
        return transfer

    def arrived(self, transfer: Transfer) -> None:
        """The target's side is settled."""
        transfer.blocks = None
        self._forget(transfer)

    def group_down(self, group: ResidentGroup) -> None:
        """What was on its way from there will not arrive, as its target is told; what was on its way to it is not sent."""
        name, others = group.group, set[GroupId]()
        for transfer in self.under_way():
            if transfer.source == name and transfer.held is not None:
                transfer.held = None  # void, like everything of the group
                others.add(transfer.target)
            if transfer.target == name and transfer.blocks is not None:
                transfer.blocks = None
                others.add(transfer.source)
            self._forget(transfer)
        for other in others - {name}:
            if other in self._state.groups:
                self._state.groups[other].issue(Cut(name, group.epoch))

    def _forget(self, transfer: Transfer) -> None:
        """Both sides are done: the number means nothing any more."""
        if transfer.held is None and transfer.blocks is None:
            self._under_way.pop(transfer.number, None)


def _ids(blocks: list[BlockId]) -> bytes:
    return np.array(blocks, np.int32).tobytes()

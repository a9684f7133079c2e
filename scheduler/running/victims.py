"""What it would cost to preempt a running sequence, read from the group and the global block table.

Imports `policy`, `resident`, `sequence` and the table.
"""

from bisect import bisect_left
from functools import partial
from operator import attrgetter

from kvcache.table import BlockTable, SequenceBlocks
from scheduler.policy import VictimCost, choose_victim
from scheduler.running.resident import ResidentGroup
from scheduler.sequence import Sequence

MOST_WEIGHED = 64
"""Sequences that are weighed against each other, the last in the order of service: a bound on the time that it takes."""


def find_victim(table: BlockTable, group: ResidentGroup, needy: Sequence) -> Sequence | None:
    """Who gives its blocks to `needy`; None if nobody may. Called when the pool is full.

    Only those later in the order of service, which never changes: so the first of a group always progresses, and nothing waits
    for nothing.
    """
    later = [sequence for sequence in group.running if sequence.place > needy.place]
    if len(later) > MOST_WEIGHED:
        later = sorted(later, key=attrgetter("place"))[-MOST_WEIGHED:]
    rows = [sequence.row for sequence in later]
    lengths, pending = group.length.take(rows).tolist(), group.pending.take(rows).tolist()
    choice = choose_victim(map(partial(_cost, table), later, lengths, pending), table.block_size)
    return None if choice is None else later[choice]


def cost_of(table: BlockTable, group: ResidentGroup, sequence: Sequence) -> VictimCost:
    """What it costs to preempt this one, which runs in the group, now."""
    return _cost(table, sequence, group.length.item(sequence.row), group.pending.item(sequence.row))


def _cost(table: BlockTable, sequence: Sequence, length: int, pending: int) -> VictimCost:
    """length: committed tokens. pending: those of them without KV."""
    blocks = sequence.blocks
    assert blocks is not None
    shared = _shared(table, blocks)
    kept = max(shared, _elsewhere(table, blocks))
    return VictimCost(
        max(0, length - pending - kept * table.block_size), len(blocks.blocks) - shared, length - sequence.prompt_tokens,
        sequence.place,
    )  # fmt: skip


def _shared(table: BlockTable, blocks: SequenceBlocks) -> int:
    """Blocks, from the first on, that others in the group hold as well. Reference counts never grow down a chain."""
    refs, held = table.pools[blocks.group].refs, blocks.blocks
    if not held or refs[held[0]] < 2:
        return 0
    return bisect_left(held, True, key=lambda block: refs[block] < 2)


def _elsewhere(table: BlockTable, blocks: SequenceBlocks) -> int:
    """Blocks, from the first on, that some other group has. Groups only drop out on the way down a chain."""
    holders, here, nodes = table.index.holders, 1 << blocks.group, blocks.nodes
    if not nodes or holders[nodes[0]] == here:
        return 0
    return bisect_left(nodes, True, key=lambda node: holders[node] == here)

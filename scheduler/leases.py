"""The leases of those who run: what they fill is published, who runs low gets more, somebody may have to give way, all end.

    advance   a report: rows that are due publish the blocks that they have filled, others have ended
    extend    it runs low: more blocks, for want of any those of a later sequence
    leave     it gives up what it has: the row, the blocks, or the wait for them
    end       and that is its end

Functions over the shared state. Imports `state`, `policy` and the table.
"""

from bisect import bisect_left
from collections.abc import Iterable
from functools import partial
from operator import attrgetter

from kvcache.ids import BlockId
from kvcache.index import NOT_NARROW
from kvcache.table import BlockTable, SequenceBlocks
from scheduler.policy import VictimCost, choose_victim
from scheduler.protocol.leaders import Drop, Grant, Remap, Trim
from scheduler.protocol.messages import Failure, FinishReason
from scheduler.state.cluster import ClusterState
from scheduler.state.prefixes import WHOLE_PROMPT
from scheduler.state.resident import ResidentGroup
from scheduler.state.sequence import Sequence, State

BY_PLACE = attrgetter("place")
"""The order of service, for sorting: quicker than to ask sequences which goes first."""

MOST_WEIGHED = 64
"""Sequences that are weighed against each other, the last in the order of service: a bound on the time that it takes."""

GAVE_UP = (
    "no token could follow: either its grammar allows none, or the model's logits were not finite (NaN or infinite); "
    "the worker's log says which"
)

# ---- it fills blocks


def advance(state: ClusterState, group: ResidentGroup, due: list[int], finished: Iterable[tuple[int, int]]) -> None:
    """A report has been committed: rows that are due are looked after, then leases end, then those that run low get more."""
    needy = [sequence for row in due if (sequence := group.sequences[row]) is not None and _look_after(state, group, sequence)]
    for lease, reason in finished:
        if (sequence := group.holder(lease)) is not None:
            output = group.length.item(sequence.row) - sequence.prompt_tokens
            leave(state, group, sequence)
            failed = reason == FinishReason.FAILED
            state.counters.given_up += failed
            finish(state, sequence, FinishReason(reason), output, GAVE_UP if failed else "")
    extend(state, group, needy)


def _look_after(state: ClusterState, group: ResidentGroup, sequence: Sequence) -> bool:
    """Looks after a row that is due: publishes what it has filled. Returns whether it runs low."""
    blocks, row = sequence.blocks, sequence.row
    assert blocks is not None
    length, pending = group.length.item(row), group.pending.item(row)
    full = (length - pending) // state.block_size
    if full > len(blocks.nodes):
        sequence.charge(length)
        _publish(state, group, sequence, blocks, full)
        if state.window is not None:
            _trim(state, group, sequence, blocks, full)
        elif sequence.narrow is not None:
            _trim(state, group, sequence, sequence.narrow, full)
    if pending == 1 and sequence in state.prefixes.waiters:
        state.waiting.join(state.prefixes.published(sequence, WHOLE_PROMPT))
    return group.schedule(sequence, length, full)


def _publish(state: ClusterState, group: ResidentGroup, sequence: Sequence, blocks: SequenceBlocks, full: int) -> None:
    """Publishes blocks that the committed computation has filled, up to `full`; a twin published first is adopted."""
    block_size, hashes = state.block_size, sequence.hashes
    assert sequence.lease is not None
    group.write_back(sequence, full * block_size)
    if not state.config.enable_prefix_caching:
        return
    for index in range(len(blocks.nodes), full):
        content = sequence.buffer[index * block_size : (index + 1) * block_size].tobytes()
        if index == len(hashes):
            sequence.hash_block(content)
        adopted = state.table.publish(blocks, content, hashes[index])
        if adopted is not None:
            group.issue(Remap(sequence.lease, index, adopted))
        if sequence.narrow is not None:
            adopted = state.table.publish(sequence.narrow, content, hashes[index])
            if adopted is not None:
                group.issue(Remap(sequence.lease, index, adopted, narrow=True))
    state.prefixes.turn_to(sequence, full)
    if sequence in state.prefixes.waiters:
        state.waiting.join(state.prefixes.published(sequence, full))


def _trim(state: ClusterState, group: ResidentGroup, sequence: Sequence, blocks: SequenceBlocks, full: int) -> None:
    """Gives back what its layers do not see any more: steps under way were launched before this, no later one reads it."""
    if state.table.trim(blocks, full):
        assert sequence.lease is not None
        group.issue(Trim(sequence.lease, blocks.first, narrow=blocks is sequence.narrow))
        state.waiting.made_room()


# ---- it gets more


def extend(state: ClusterState, group: ResidentGroup, needy: Iterable[Sequence] = ()) -> None:
    """Grants blocks to the leases that run low and to the starved, oldest first: it takes from nobody just served."""
    if group.starved:
        needy = list({*group.starved, *needy})
        group.starved.clear()
        group.touch()
    for sequence in sorted(needy, key=BY_PLACE):
        if sequence.state is State.RUNNING:  # neither ended in this report nor the victim of an older one
            _grant(state, group, sequence)


def _grant(state: ClusterState, group: ResidentGroup, sequence: Sequence) -> None:
    """Extends a lease; without a free block a later sequence gives its blocks up, in this same call."""
    assert sequence.blocks is not None
    assert sequence.lease is not None
    length = group.length.item(sequence.row)
    blocks = _grow(state, group, sequence, sequence.blocks, group.wanted(sequence, length))
    if blocks is None:
        return
    others: list[BlockId] | None = []
    if (narrow := sequence.narrow) is not None:
        others = _grow(state, group, sequence, narrow, group.wanted_narrow(sequence, narrow, length))
    if blocks or others:
        group.issue(Grant(sequence.lease, tuple(blocks), tuple(others or ())))
    if others is not None:
        group.schedule(sequence, length, group.computed(sequence.row) // state.block_size)


def _grow(
    state: ClusterState, group: ResidentGroup, sequence: Sequence, blocks: SequenceBlocks, wanted: int
) -> list[BlockId] | None:  # fmt: skip
    """The blocks by which it has grown up to so many; None: there are none, and it starves."""
    more = max(0, wanted - len(blocks.blocks))
    while (grown := state.table.grow(blocks, more)) is None:
        victim = find_victim(state.table, group, sequence)
        if victim is None:
            group.lease_waits += 1
            group.starved.append(sequence)  # its row stays due: the next report tries again
            group.touch()
            return None
        preempt(state, group, victim)
    return grown


def find_victim(table: BlockTable, group: ResidentGroup, needy: Sequence) -> Sequence | None:
    """Who gives its blocks to `needy`; None if nobody may. Called when the pool is full.

    Only those later in the order of service, which never changes: so the first of a group always progresses, and nothing waits
    for nothing.
    """
    later = [sequence for sequence in group.running if sequence.place > needy.place]
    if len(later) > MOST_WEIGHED:
        later = sorted(later, key=BY_PLACE)[-MOST_WEIGHED:]
    rows = [sequence.row for sequence in later]
    lengths, pending = group.length.take(rows).tolist(), group.pending.take(rows).tolist()
    choice = choose_victim(map(partial(_cost, table), later, lengths, pending), table.block_size)
    return None if choice is None else later[choice]


def _cost(table: BlockTable, sequence: Sequence, length: int, pending: int) -> VictimCost:
    """length: committed tokens. pending: those of them without KV."""
    blocks = sequence.blocks
    assert blocks is not None
    shared = _shared(table, blocks)
    kept = max(shared, _elsewhere(table, blocks)) if table.window_blocks is None else _seen_by_others(table, blocks)
    return VictimCost(
        max(0, length - pending - kept * table.block_size), len(blocks.blocks) - blocks.first - shared,
        length - sequence.prompt_tokens, sequence.place,
    )  # fmt: skip


def _shared(table: BlockTable, blocks: SequenceBlocks) -> int:
    """Blocks, from the first on, that others in the group hold as well. Reference counts never grow down a chain; where there
    is a window they do, and are counted."""
    refs, held = table.pools[blocks.group].refs, blocks.blocks
    if table.window_blocks is not None:
        return sum(refs[block] > 1 for block in blocks.held)
    if not held or refs[held[0]] < 2:
        return 0
    return bisect_left(held, True, key=lambda block: refs[block] < 2)


def _elsewhere(table: BlockTable, blocks: SequenceBlocks) -> int:
    """Blocks, from the first on, that some other group has. Groups only drop out on the way down a chain."""
    holders, here, nodes = table.index.holders, 1 << blocks.group, blocks.nodes
    if not nodes or holders[nodes[0]] & NOT_NARROW == here:
        return 0
    return bisect_left(nodes, True, key=lambda node: holders[node] & NOT_NARROW == here)


def _seen_by_others(table: BlockTable, blocks: SequenceBlocks) -> int:
    """Blocks after which it could go on if its own were lost: all that are published, or none, if not each that it sees of them
    is held by others here, or by one other group."""
    refs, holders, here = table.pools[blocks.group].refs, table.index.holders, 1 << blocks.group
    seen = list(zip(blocks.held, blocks.nodes[blocks.first :], strict=False))
    elsewhere = ~here
    for _, node in seen:
        elsewhere &= holders[node]
    return len(blocks.nodes) if elsewhere or all(refs[block] > 1 for block, _ in seen) else 0


# ---- it gives up what it has


def preempt(state: ClusterState, group: ResidentGroup, victim: Sequence) -> None:
    """Its blocks are wanted. What it had stays cached as long as it can."""
    state.counters.preemptions += 1
    state.counters.recomputed_tokens += group.computed(victim.row)
    victim.preemptions += 1
    interrupt(state, group, victim)


def interrupt(state: ClusterState, group: ResidentGroup, sequence: Sequence) -> None:
    """A running sequence waits again, from its committed tokens on."""
    assert sequence.lease is not None
    group.write_back(sequence)
    group.issue(Drop(sequence.lease))
    leave(state, group, sequence)
    state.waiting.enter(sequence, state.now_s)


def leave(state: ClusterState, group: ResidentGroup, sequence: Sequence, *, lost: bool = False) -> None:
    """The row and the blocks are given back. Tokens that are still needed have been written back.

    One that waits for its prefix has no row; blocks stay with the transfer that writes them until that is over. lost: the group
    is.
    """
    if sequence.lease is None:
        del group.fetching[sequence]
        for blocks in () if lost else sequence.tables:
            if not state.transfers.writes(blocks):
                state.table.release(blocks)
        group.touch()
    else:
        if not lost:
            if sequence.kept:
                group.write_back(sequence)
            _release(state, group, sequence)
        group.unseat(sequence)
    sequence.blocks = sequence.narrow = None
    state.waiting.made_room(state.prefixes.give_up(sequence))


def _release(state: ClusterState, group: ResidentGroup, sequence: Sequence) -> None:
    """What the blocks hold stays cached as long as it can: the part of the last one, too, and a copy in host memory."""
    blocks, tables, tail = sequence.blocks, sequence.tables, group.tail(sequence)
    assert blocks is not None
    # What the last block begins with, if that was copied, is known by the block that it was copied from.
    if 0 < state.stride <= len(tail) and len(tail) > blocks.inherited:
        for each in tables:
            state.table.publish_tail(each, tail.tobytes())
    if group.host_blocks:
        state.transfers.offload(group, sequence)
    for each in tables:
        state.table.release(each)


# ---- it ends


def end(
    state: ClusterState, sequence: Sequence, reason: FinishReason, message: str = "", failure: Failure = Failure.FAULT,
    *, keep_tokens: int | None = None,
) -> None:  # fmt: skip
    """A sequence ends, wherever it is. keep_tokens: of its output, if that is longer."""
    group, output = state.group_of(sequence), state.output_of(sequence)
    if sequence.lease is not None and group is not None:
        group.issue(Drop(sequence.lease))
    if group is not None:
        leave(state, group, sequence)
    finish(state, sequence, reason, output if keep_tokens is None else min(keep_tokens, output), message, failure)
    if group is not None:
        extend(state, group)  # somebody there may have waited for its blocks


def finish(
    state: ClusterState, sequence: Sequence, reason: FinishReason, output: int, message: str = "",
    failure: Failure = Failure.FAULT,
) -> None:  # fmt: skip
    """The one end of a sequence that holds nothing any more. output: its tokens."""
    if sequence.state in (State.WAITING, State.DEFERRED):
        state.waiting.leave(sequence, state.now_s)
    sequence.charge(sequence.prompt_tokens + output)
    sequence.tenant.live -= 1
    sequence.state = State.ENDED
    del state.sequences[sequence.front_end, sequence.stream]
    state.counters.finished += 1
    if sequence.kept:
        state.recall.ended(sequence, output, state.now_s)
    state.outbox.finished(sequence, reason, output, message, failure)


def expire(state: ClusterState) -> None:
    """Ends those whose deadline has passed, whether they wait or run."""
    while (sequence := state.deadlines.passed(state.now_s)) is not None:
        state.counters.expired += 1
        begun = sequence.cached_tokens is not None
        where = f"it has {state.output_of(sequence)} tokens of output" if begun else "it has not begun"
        message = f"the request did not end within {sequence.deadline_s - sequence.arrived_s:g} s: {where}"
        end(state, sequence, FinishReason.FAILED, message, Failure.TIMED_OUT)

"""Blocks on their way from one pool to another, beside the steps: who holds them meanwhile, and what follows when they arrive.

    fetch    a group's blocks to another group   Send to the one, Receive to the other; each answers once: Moved
    offload  a group's blocks to its host memory  Offload; one answer
    load     and back                            Load; one answer

Both ends are pinned until the side that reads or writes them has answered, or is gone. Where there are narrow layers beside
others, each kind's blocks are a transfer of their own, and whoever waits for them waits for both.

Host memory is a second, larger cache for each group: what a sequence has published is copied there when it leaves. So eviction
loses nothing and takes no time; `placement` brings blocks back when that is cheaper than to compute them. The tier holds what
the device holds and more (inclusive, as SGLang's HiCache is), which keeps prefixes whole there: it is a pool of the table like
others, with its own order of eviction. Imports `resident`, `sequence` and the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvcache.ids import BlockId, GroupId, group_of, host_of, is_host, is_narrow, narrow_of
from kvcache.match import Match
from kvcache.table import BlockTable, SequenceBlocks
from scheduler.protocol.leaders import Cut, LeaseId, Load, Moved, Offload, Receive, Send
from scheduler.state.counters import Counters
from scheduler.state.resident import ResidentGroup
from scheduler.state.sequence import Sequence

OFFLOADING_SHARE = 4
"""Of a pool, one part in so many may be on its way to host memory: what is pinned for that is no room for others."""

FETCH_PRIOR = 0.1
"""Time to fetch a token, in times to compute one, until both are measured: what a network of 25 GB/s and a large model have."""

LOAD_PRIOR = 0.05
"""The same of host memory."""

SMOOTHING = 0.1
"""Weight of the newest measurement."""

LEAST_TOKENS = 64
"""A step or a transfer of fewer says more of latency than of a rate."""


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
        return self.blocks is not None and (self.author.blocks is self.blocks or self.author.narrow is self.blocks)


class Transfers:
    """Those under way, by number, and what they take. Its own are the numbers.

    fetch_cost, load_cost: what fetching a token from another group, and loading it from host memory, takes, in times to compute
    one; as the workers report it, averaged over the cluster.
    """

    def __init__(self, table: BlockTable, groups: Mapping[GroupId, ResidentGroup], counters: Counters) -> None:
        self.fetch_cost = FETCH_PRIOR
        self.load_cost = LOAD_PRIOR
        self._table = table
        self._groups = groups
        self._counters = counters
        self._under_way: dict[int, Transfer] = {}
        self._numbers = 0
        self._token_s: dict[str, float] = {}  # what has been measured

    def holders(self) -> list[SequenceBlocks]:
        """The blocks that transfers hold and no sequence does, for the invariants."""
        held = [transfer.held for transfer in self._under_way.values() if transfer.held is not None]
        orphans = [transfer.blocks for transfer in self._under_way.values() if transfer.blocks and not transfer.awaited]
        return [*held, *orphans]

    def under_way(self) -> list[Transfer]:
        return list(self._under_way.values())

    # ---- on their way

    def begin(
        self, author: Sequence, held: SequenceBlocks, blocks: SequenceBlocks, *, part: int = 0, known_blocks: int = 0,
        moves: LeaseId | None = None,
    ) -> None:  # fmt: skip
        """Brings the blocks of `held` that `blocks` has no content for to the same places there."""
        first, end = max(len(blocks.nodes), blocks.first), len(held.blocks)
        number, self._numbers = self._numbers, self._numbers + 1
        self._under_way[number] = Transfer(
            number, held.group, blocks.group, author, held, blocks, first, end, part, known_blocks, moves
        )
        source, target, narrow = self._device(held.group), self._device(blocks.group), is_narrow(blocks.group)
        read, written = _ids(held.blocks[first:]), _ids(blocks.blocks[first:end])
        if source is not None:
            source.sending += end - first
        if target is not None:
            target.receiving += end - first
        if source is not None and target is not None:
            source.issue(Send(number, read, target.group, target.epoch, narrow))
            target.issue(Receive(number, written, source.group, source.epoch, source.ports, narrow))
        elif source is not None:
            source.issue(Offload(number, read, written, narrow))
        elif target is not None:
            target.issue(Load(number, read, written, narrow))

    def _device(self, pool: GroupId) -> ResidentGroup | None:
        """The group in whose pool blocks are read or written; None for host memory, and for a group that has gone."""
        return None if is_host(pool) else self._groups.get(group_of(pool))

    def offload(self, group: ResidentGroup, sequence: Sequence) -> None:
        """The sequence is about to give its blocks back: what the host tier has not is copied there.

        Not all of it where the tier is busy, and nothing where room is short, as after a preemption.
        """
        assert sequence.blocks is not None
        table, host = self._table, host_of(group.group)
        match = table.index.chain(sequence.blocks.nodes)
        depth, published = match.depth(host), len(match.nodes)
        most = min(group.blocks // OFFLOADING_SHARE - group.sending, table.pools[group.group].available)
        if sequence.narrow is not None:
            self._offload_both(group, sequence, match, most)
            return
        if table.window_blocks is None:
            new = min(published - depth, most)
            if new <= 0:
                return
            held = table.hold(group.group, match, depth + new, sequence.salt)
            stored = table.reserve(host, match, depth, new, sequence.salt)
        else:
            new = published - table.first_seen(host, published)
            if depth == published or new > most:
                return  # a part of a window is good for nothing
            held = table.hold(group.group, match, published, sequence.salt)
            stored = table.reserve_window(host, published, new, sequence.salt)
        if stored is None:  # host memory is full of what is on its way
            table.release(held)
        else:
            self.begin(sequence, held, stored)

    def _offload_both(self, group: ResidentGroup, sequence: Sequence, match: Match, most: int) -> None:
        """All blocks that it has published, and what is seen after them of those of narrow layers; or nothing."""
        table, host, salt = self._table, host_of(group.group), sequence.salt
        depth, published = match.depth(host), len(match.nodes)
        seen = published - table.first_seen(narrow_of(host), published)
        room = min(most, table.pools[narrow_of(group.group)].available)
        if depth == published or published - depth + seen > room:
            return
        stored = table.reserve(host, match, depth, published - depth, salt)
        beside = table.reserve_window(narrow_of(host), published, seen, salt) if stored is not None else None
        if stored is None or beside is None:
            if stored is not None:
                table.release(stored)
            return
        match = match._replace(generation=table.index.generation)  # the group's own blocks of it are held by the sequence
        for pool, blocks in ((group.group, stored), (narrow_of(group.group), beside)):
            self.begin(sequence, table.hold(pool, match, published, salt), blocks)

    # ---- answers

    def answered(self, group: ResidentGroup, moved: Moved) -> Transfer | None:
        """One side is done. Returns the transfer if its blocks have been written, or will not be: to be settled."""
        group.touch()
        transfer = self._under_way.get(moved.transfer)
        if transfer is None:
            return None
        loads, stores = is_host(transfer.source), is_host(transfer.target)
        blocks = transfer.end - transfer.first
        if transfer.held is not None and (loads or group_of(transfer.source) == group.group):
            group.sending -= 0 if loads else blocks
            self._table.release(transfer.held)
            transfer.held = None
            self._forget(transfer)
        if transfer.blocks is None or not (stores or group_of(transfer.target) == group.group):
            return None
        group.receiving -= 0 if stores else blocks
        if moved.ok and not stores and not is_narrow(transfer.target):
            self.measured("load" if loads else "fetch", blocks * self._table.block_size, moved.elapsed_s)
        return transfer

    def settle(self, transfer: Transfer, *, ok: bool) -> bool:
        """What has arrived is published where it went. Returns whether the author waits for it; else nobody holds it now. Where
        it has not the author does not follow what else is on its way."""
        blocks, author, awaited, block_size = transfer.blocks, transfer.author, transfer.awaited, self._table.block_size
        assert blocks is not None
        self._count(transfer, ok)
        for other in self._under_way.values() if transfer.moves is not None and not ok else ():
            if other.author is author:
                other.moves = None
        for index in range(len(blocks.nodes), transfer.tokens_end) if ok else ():
            content = author.buffer[index * block_size : (index + 1) * block_size].tobytes()
            if index < transfer.first:
                self._table.name_above(blocks, content, author.hashes[index])
            else:
                self._table.publish(blocks, content, author.hashes[index])
        if not awaited:
            self._table.release(blocks)
        transfer.blocks = None
        self._forget(transfer)
        return awaited

    def _count(self, transfer: Transfer, ok: bool) -> None:
        counters = self._counters
        tokens = (transfer.tokens_end - transfer.first) * self._table.block_size + transfer.part
        if not ok:
            counters.failed_transfers += 1
        elif is_narrow(transfer.target):
            pass  # its tokens are those of the other kind's
        elif is_host(transfer.target):
            counters.offloaded_tokens += tokens
        elif is_host(transfer.source):
            counters.loads += 1
            counters.loaded_tokens += tokens
        else:
            counters.fetches += 1
            counters.fetched_tokens += tokens

    def group_down(self, group: ResidentGroup) -> None:
        """What was on its way from there will not arrive, as its target is told; what was on its way to it is not sent."""
        others = set[GroupId]()
        for transfer in self.under_way():
            source, target = group_of(transfer.source), group_of(transfer.target)
            if source == group.group:
                transfer.held = None  # void, like everything of the group
                others.add(target)  # even if the source has answered: that it failed, before it went
            if target == group.group:
                transfer.blocks = None
                others.add(source)
            self._forget(transfer)
        for other in sorted(others - {group.group}):
            if other in self._groups:
                self._groups[other].issue(Cut(group.group, group.epoch))

    def measured(self, what: Literal["compute", "fetch", "load"], tokens: int, elapsed_s: float) -> None:
        """So many tokens have been fetched or loaded, or computed by a step most of whose tokens are of prompts."""
        if tokens < LEAST_TOKENS or elapsed_s <= 0:
            return
        newest, token_s = elapsed_s / tokens, self._token_s
        known = token_s.get(what, newest)
        token_s[what] = known + SMOOTHING * (newest - known)
        if "compute" in token_s:
            self.fetch_cost = token_s["fetch"] / token_s["compute"] if "fetch" in token_s else FETCH_PRIOR
            self.load_cost = token_s["load"] / token_s["compute"] if "load" in token_s else LOAD_PRIOR

    def moving(self, sequence: Sequence) -> bool:
        """Its blocks are on their way to where it will go on."""
        return any(transfer.moves == sequence.lease and transfer.author is sequence for transfer in self._under_way.values())

    def expected(self, sequence: Sequence) -> bool:
        """Blocks are on their way that it waits for, or to where it will go on, and have not arrived."""
        return any(
            transfer.author is sequence and transfer.blocks is not None
            and (transfer.awaited or (transfer.moves is not None and transfer.moves == sequence.lease))
            for transfer in self._under_way.values()
        )  # fmt: skip

    def writes(self, blocks: SequenceBlocks) -> bool:
        """Something is on its way to these."""
        return any(transfer.blocks is blocks for transfer in self._under_way.values())

    def _forget(self, transfer: Transfer) -> None:
        """Both sides are done: the number means nothing any more."""
        if transfer.held is None and transfer.blocks is None:
            self._under_way.pop(transfer.number, None)


def _ids(blocks: list[BlockId]) -> bytes:
    return np.array(blocks, np.int32).tobytes()

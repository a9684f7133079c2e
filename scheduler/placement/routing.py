"""The ways to serve a waiting sequence, and the cheapest of them: facts for `policy`, gathered from few of many groups.

All groups stand side by side, as columns: who is worth a closer look when a sequence is to be placed, however many there are.
Imports `state`, `policy`, `why` and the table. Changes nothing but its columns.
"""

import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from kvcache.ids import GroupId, group_of, host_of, is_host, narrow_of
from kvcache.match import Match, Part
from scheduler import policy
from scheduler.placement import why
from scheduler.state.cluster import ClusterState
from scheduler.state.prefixes import Peer, Promise
from scheduler.state.resident import ResidentGroup
from scheduler.state.sequence import Sequence, Tokens

FEW_GROUPS = 24
"""So many are looked at one by one, at 3 us each; array operations over all of them take 70 us, however many there are."""


class Source(NamedTuple):
    """A pool that what it has of a prefix could be brought from: whole blocks, and perhaps part of one. tokens: of all.

    sender: the group that would send it, or read it from its own host memory.
    """

    pool: GroupId
    sender: ResidentGroup
    depth: int
    part: Part | None
    tokens: int

    @property
    def blocks(self) -> int:
        return self.depth + (self.part is not None)


Way = tuple[policy.GroupLoad, Source | None]
"""To serve a sequence in a group: what policy sees of the group, as it is or with what the source has."""


@dataclass(slots=True)
class Newcomer:
    """A sequence that is to be placed, and what is there of its prefix. tokens: its committed ones.

    reusable: tokens that a hit may cover. match: its full blocks. peers: who fills, as it seems, the block that it needs next;
    promise: the most that one of them is about to compute for it. blocks: needed at the start, those of the match included.
    Found when its turn has come: parts, by group, what it has of the block after its whole blocks; source, what could be sent
    by the group that has most of the prefix.
    """

    sequence: Sequence
    tokens: Tokens
    reusable: int
    match: Match
    peers: Listing[Peer]
    promise: Promise | None
    blocks: int
    parts: dict[GroupId, Part] = field(default_factory=dict)
    source: Source | None = None


class GroupRouter:
    """groups: in the order in which they came up. backlog, running: as in `policy.GroupLoad`. room: blocks that a
    newcomer may take, below 0 where none may start. free, available, blocks: blocks of the pool. receiving: blocks on their way
    to it. senders: the groups, by id, that can exchange blocks with others. explain: who is told of every decision.

    Invariant: a row of the columns says what its group does, unless the group is in `watch.touched`; so `refresh` comes before
    every look. It costs nothing for the groups that nothing has happened to.
    """

    def __init__(self, state: ClusterState) -> None:
        self.explain: why.Tell | None = why.log if state.config.log_decisions else None
        self._state, self._window, self._narrow = state, state.window, state.narrow
        self.regroup()

    def check(self) -> None:
        """What it sees of each group is what the group says itself. Errors: AssertionError."""
        assert self.groups == list(self._state.groups.values()), "routing sees other groups"
        for at, group in enumerate(self.groups):
            seen, row = self.seen(at), self.row(group)
            assert group.touched or seen == row, f"group {group.group}: routing sees {seen}, it has {row}"

    # ---- all groups

    def regroup(self) -> None:
        """A group has come or gone."""
        self.groups = list(self._state.groups.values())
        self._at = {group.group: at for at, group in enumerate(self.groups)}
        self._rows = np.zeros((6, len(self.groups)), np.int64)
        self.backlog, self.running, self.room, self.free, self.available, self.receiving = self._rows
        self.blocks = np.array([group.blocks for group in self.groups], np.int64)
        self.senders = {group.group: group for group in self.groups if group.ports}
        for group in self.groups:
            group.touch()

    def refresh(self) -> None:
        touched = self._state.watch.touched
        for group in touched:
            group.touched = False
            self._rows[:, self._at[group.group]] = self.row(group)
        touched.clear()

    def row(self, group: ResidentGroup) -> tuple[int, int, int, int, int, int]:
        """(backlog, running, room, free, available, receiving) of one group, read from itself."""
        pool, running = self._state.table.pools[group.group], len(group.running) + len(group.fetching)
        available = pool.available
        takes = group.rows_left > 0 and not group.starved and not group.closed
        room = policy.room(available, group.blocks, running) if takes else -1
        return group.coming, running, room, pool.free, available, group.receiving

    def seen(self, at: int) -> tuple[int, ...]:
        """What `row` was at the last look."""
        return tuple(self._rows[:, at].tolist())

    def most_room(self) -> int:
        """Blocks that a newcomer could have at most, in the group that has most; below 0 if none takes any."""
        self.refresh()
        return int(self.room.max(initial=-1))

    def least_backlog(self) -> int | None:
        """Of the groups that take a newcomer; None if none does."""
        self.refresh()
        backlogs = self.backlog[self.room > 0]
        return int(backlogs.min()) if len(backlogs) else None

    def _spread(self, values: Mapping[GroupId, int]) -> policy.Ints:
        """[groups] of these, and 0 for the others. What belongs to no group, as host memory does, is left out."""
        column = np.zeros(len(self.groups), np.int64)
        places = [at for pool in values if (at := self._at.get(pool)) is not None]
        column[places] = [value for pool, value in values.items() if pool in self._at]
        return column

    # ---- one prompt

    def cheapest(
        self, newcomer: Newcomer, only: ResidentGroup | None = None, *, few: int = FEW_GROUPS
    ) -> tuple[ResidentGroup, Source | None] | None:
        """Where it goes, as the group is or with what the source has; None if there is no room anywhere now.

        only: look at this group alone. Of more groups than `few` only those are looked at closely that may be the cheapest:
        one, as a rule.
        """
        newcomer.source = self._best_source(newcomer.match, newcomer.parts) if newcomer.sequence.brought else None
        each = only is not None or len(self.groups) <= few
        bounds = self._each(newcomer, only) if each else self._promising(newcomer)
        least = self._state.block_size if only is None else 1  # one that moves stands still: its last part comes too
        choice = policy.route(bounds, partial(self._ways, newcomer, least), len(newcomer.tokens), self._state.block_size)
        if choice is None:
            return None
        if self.explain is not None:
            self.explain(self._why(newcomer, least))
        return self.groups[choice[0]], choice[1]

    def _each(self, newcomer: Newcomer, only: ResidentGroup | None = None) -> list[policy.Bound]:
        """Of few groups each is looked at."""
        at_once = newcomer.sequence.blocks_at_once
        return [
            (-math.inf, 0, at) for at, group in enumerate(self.groups)
            if group.blocks >= at_once and not (group.closed if only is None else group.draining or group is not only)
        ]  # fmt: skip

    def _promising(self, newcomer: Newcomer) -> Iterator[policy.Bound]:
        """Costs a few array operations over all groups."""
        self.refresh()
        depths = self._spread(newcomer.match.depths)
        hits = depths * self._state.block_size + self._spread({pool: part.tokens for pool, part in newcomer.parts.items()})
        fits = (self._new_blocks(newcomer, depths) <= self.room) & (self.blocks >= newcomer.sequence.blocks_at_once)
        return policy.cheapest_first(self._least_costs(newcomer, depths, hits), fits, self.available)

    def _least_costs(self, newcomer: Newcomer, depths: policy.Ints, hits: policy.Ints) -> policy.Floats:
        """[groups] what each costs at least, in the best of its ways."""
        block_size, transfers = self._state.block_size, self._state.transfers
        tokens, source = len(newcomer.tokens), newcomer.source
        there = self.backlog, self.running, self._new_blocks(newcomer, depths) - self.free, block_size
        least = policy.least_costs(tokens - hits, *there)
        if source is not None:
            stay = self._stay(depths, source.depth)
            moving = np.maximum(0, source.blocks - stay) + self.receiving + source.sender.sending
            work = policy.fetch_work(transfers.fetch_cost, block_size, moving)
            least = np.minimum(least, policy.least_costs(tokens - source.tokens, *there, work))
        if hosts := {group_of(pool): depth for pool, depth in newcomer.match.depths.items() if is_host(pool)}:
            in_host = self._spread(hosts)
            moving = np.maximum(0, in_host - self._stay(depths, in_host)) + self.receiving
            work = policy.fetch_work(transfers.load_cost, block_size, moving)
            least = np.minimum(least, policy.least_costs(tokens - in_host * block_size, *there, work))
        return least

    def _new_blocks(self, newcomer: Newcomer, depths: policy.Ints) -> policy.Ints:
        """[groups] blocks that it needs beside those of its hit; with a window at least, as what it sees may be brought."""
        new_blocks, window = newcomer.blocks - depths, self._window
        if window is None:
            return new_blocks
        beside: policy.Ints = np.minimum(new_blocks, window.most - np.minimum(depths, window.seen))
        return beside.clip(max=window.to_bring(newcomer.blocks, len(newcomer.match.nodes)))

    def _stay(self, depths: policy.Ints, sources: policy.Ints | int) -> policy.Ints:
        """[groups] how many blocks of what sources have are not brought, from the first on: the group has them, or they are not
        seen."""
        if self._window is None:
            return depths
        unseen: policy.Ints = sources - np.full_like(depths, self._window.seen)
        return unseen.clip(min=0)

    def _ways(self, newcomer: Newcomer, least: int, at: int) -> list[Way]:
        """The group as it is; and with what another, or its own host memory, has more of the prefix. least: tokens that a
        transfer must bring to be worth it."""
        group, source = self.groups[at], newcomer.source
        bare = self._load(group, newcomer)
        ways: list[Way] = [(bare, None)]
        if source is None and not (group.host_blocks and newcomer.sequence.brought):
            return ways
        transfers = self._state.transfers
        found: list[tuple[Source, int, float]] = []  # with the blocks that go there first, and the cost of a token
        if source is not None and source.sender is not group and len(source.sender.ports) == len(group.ports):
            found.append((source, group.receiving + source.sender.sending, transfers.fetch_cost))
        hosts = group.host_blocks and newcomer.sequence.brought
        if hosts and (depth := newcomer.match.depth(host := host_of(group.group))):
            tokens = depth * self._state.block_size
            found.append((Source(host, group, depth, None, tokens), group.receiving, transfers.load_cost))
        for source, queued, cost in found:
            if source.tokens - bare.hit_tokens >= least:
                ways.append((self._with(bare, newcomer, group, source, queued, cost), source))
        return ways

    def _lacks_narrow(self, group: ResidentGroup, newcomer: Newcomer, source: Source | None = None) -> bool:
        """Whether there is no room for the blocks of its narrow layers."""
        if self._narrow is None:
            return False
        beside, match = narrow_of(group.group), newcomer.match
        pool, depth = self._state.table.pools[beside], match.depth(group.group)
        if source is not None:
            new_blocks = self._narrow.to_bring(newcomer.blocks, source.depth)
        else:
            revived = self._state.table.cached_in_match(beside, match, depth) if depth else 0
            new_blocks = self._narrow.new_blocks(newcomer.blocks, depth) + revived
        return new_blocks > policy.room(pool.available, pool.total, len(group.running) + len(group.fetching))

    def _with(
        self, bare: policy.GroupLoad, newcomer: Newcomer, group: ResidentGroup, source: Source, queued: int, cost: float
    ) -> policy.GroupLoad:  # fmt: skip
        """The load of a group with what the source has: what the group lacks of it, or, with a window, what is seen of it."""
        window = self._window
        stays = newcomer.match.depth(group.group) if window is None else window.first(source.depth)
        work = policy.fetch_work(cost, self._state.block_size, source.blocks - stays + queued)
        if self._narrow is not None:
            lacks = bool(group.starved) or self._lacks_narrow(group, newcomer, source)
            return bare._replace(hit_tokens=source.tokens, fetch_work=work, starving=lacks)
        if window is None:
            return bare._replace(hit_tokens=source.tokens, fetch_work=work)
        new_blocks = window.to_bring(newcomer.blocks, source.depth)
        return bare._replace(hit_tokens=source.tokens, fetch_work=work, new_blocks=new_blocks, revived=0)

    def _best_source(self, match: Match, parts: dict[GroupId, Part]) -> Source | None:
        """The group that could send the most of the prefix, of several the one with the lowest id; None if nobody could.

        A host tier is its own group's alone. Where there are narrow layers whole blocks are sent only.
        """
        state, senders = self._state, self.senders
        if not state.config.prefix_fetch or len(senders) < 2:
            return None
        depths = match.depths
        deepest = max((depth for pool, depth in depths.items() if pool in senders), default=0)
        pools = [pool for pool in parts if depths.get(pool, 0) == deepest and pool in senders and self._narrow is None]
        pool = max(
            (pool for pool in pools if state.table.may_hold(pool, parts[pool])),
            key=lambda pool: (parts[pool].tokens, -pool), default=None,
        )  # fmt: skip
        part = None if pool is None else parts[pool]
        if pool is None and deepest:
            pool = min(pool for pool, depth in depths.items() if depth == deepest and pool in senders)
        if pool is None:
            return None
        return Source(pool, senders[pool], deepest, part, deepest * state.block_size + (part.tokens if part else 0))

    def _load(self, group: ResidentGroup, newcomer: Newcomer) -> policy.GroupLoad:
        """What the group would have to spend on the sequence now."""
        table, depth, part = self._state.table, newcomer.match.depths.get(group.group, 0), newcomer.parts.get(group.group)
        pool, hit, revived = table.pools[group.group], 0, 0
        if depth:
            hit = depth * table.block_size
            revived = table.cached_in_match(group.group, newcomer.match, depth)
        if part is not None:
            hit += part.tokens
        free, fetching, window = len(pool.free_stack), len(group.fetching), self._window
        new_blocks = newcomer.blocks - depth if window is None else window.new_blocks(newcomer.blocks, depth)
        return policy.GroupLoad(  # by position, which is quicker: hit_tokens, new_blocks, ...
            hit, new_blocks + revived, free, free + pool.cached, group.blocks, len(group.free_rows) - fetching,
            len(group.running) + fetching, group.coming if fetching else group.backlog,
            bool(group.starved) or (self._narrow is not None and self._lacks_narrow(group, newcomer)), 0.0, revived,
        )  # fmt: skip

    def _why(self, newcomer: Newcomer, least: int) -> why.Decision:
        """Looks at every group that is large enough, those included that nobody had to look at."""
        sequence, now_s = newcomer.sequence, self._state.now_s
        ways = [(self.groups[at].group, self._ways(newcomer, least, at)) for _, _, at in self._each(newcomer)]
        seen = [
            (group, load, of_group[0][0].hit_tokens, source.pool if source else None)
            for group, of_group in ways
            for load, source in of_group
        ]
        best, *others = why.rank(seen, sequence.committed, self._state.block_size)
        return why.Decision(
            now_s, sequence.front_end, sequence.stream, sequence.committed, now_s - sequence.arrived_s,
            sequence.preemptions, 1 + len(others), best, others[0] if others else None,
        )  # fmt: skip

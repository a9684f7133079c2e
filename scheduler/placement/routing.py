"""The ways to serve a waiting sequence, and the cheapest of them: facts for `policy`, gathered from few of many groups.

Imports `state`, `policy`, `why` and the table. Changes nothing.
"""

from typing import NamedTuple

import numpy as np

from kvcache.ids import GroupId, group_of, host_of, is_host
from kvcache.match import Match, Part
from scheduler import policy
from scheduler.placement import why
from scheduler.running.resident import ResidentGroup
from scheduler.sequence import Sequence
from scheduler.state import ClusterState

FEW_GROUPS = 24
"""So many are looked at one by one, at 3 us each; array operations over all of them take 70 us, however many there are."""


class Source(NamedTuple):
    """A pool that what it has of a prefix could be brought from: whole blocks, and perhaps part of one. tokens: of all.

    sender: the group that would send it; None for a group's own host memory.
    """

    pool: GroupId
    sender: ResidentGroup | None
    depth: int
    part: Part | None
    tokens: int

    @property
    def blocks(self) -> int:
        return self.depth + (self.part is not None)


Way = tuple[policy.GroupLoad, Source | None]
"""To serve a sequence in a group: what policy sees of the group, as it is or with what the source has."""


class Offer(NamedTuple):
    """A way to serve a sequence: in this group, as it is or with the prefix of another. load: what policy sees of it."""

    group: ResidentGroup
    load: policy.GroupLoad
    source: Source | None = None


class Prompt(NamedTuple):
    """What is to be placed. parts: by group, what it has of the block after its whole blocks. blocks: needed at the start.

    source: what could be sent by the group that has most of it. least: tokens that a transfer must bring, to be worth it.
    """

    sequence: Sequence
    match: Match
    parts: dict[GroupId, Part]
    blocks: int
    source: Source | None
    least: int


class Routing:
    """Works on the shared state; has none of its own."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state

    def cheapest(
        self, sequence: Sequence, match: Match, parts: dict[GroupId, Part], only: ResidentGroup | None = None
    ) -> Offer | None:
        """None if there is no room anywhere now. only: look at this group alone.

        Of many groups only those are looked at closely that may be the cheapest: one, as a rule.
        """
        state, few = self._state, only is not None or len(self._state.columns.groups) <= FEW_GROUPS
        least = state.config.block_size if only is None else 1  # one that moves stands still: its last part comes too
        blocks = state.blocks_for(sequence, sequence.committed)
        prompt = Prompt(sequence, match, parts, blocks, self._best_source(match, parts), least)
        offer = self._of_few(prompt, only) if few else self._of_many(prompt)
        if offer is not None and (tell := why.listener(state.explain)) is not None:
            tell(self._why(prompt))
        return offer

    def _of_few(self, prompt: Prompt, only: ResidentGroup | None = None) -> Offer | None:
        """Each group, one after the other; ties as in `policy.route`."""
        block_size, tokens, at_most = self._state.config.block_size, prompt.sequence.committed, prompt.sequence.blocks_at_most
        best: tuple[float, int, int, int] | None = None
        offer: Offer | None = None
        for at, group in enumerate(self._state.columns.groups):
            if group.blocks < at_most or group.draining or (only is not None and group is not only):
                continue
            for way, (load, source) in enumerate(self._ways(group, prompt)):
                if policy.admissible(load):
                    found = policy.time_to_first_token(load, tokens, block_size), -load.available, at, way
                    if best is None or found < best:
                        best, offer = found, Offer(group, load, source)
        return offer

    def _of_many(self, prompt: Prompt) -> Offer | None:
        """Costs a few array operations over all groups, for what each of them costs at least, and few close looks."""
        columns, block_size = self._state.columns, self._state.config.block_size
        columns.refresh()
        depths = columns.spread(prompt.match.depths)
        hits = depths * block_size + columns.spread({pool: part.tokens for pool, part in prompt.parts.items()})
        fits = (prompt.blocks - depths <= columns.room) & (columns.blocks >= prompt.sequence.blocks_at_most)
        least = self._least_costs(prompt, depths, hits)
        seen: dict[int, list[Way]] = {}

        def look(at: int) -> list[policy.GroupLoad]:
            seen[at] = self._ways(columns.groups[at], prompt)
            return [load for load, _ in seen[at]]

        choice = policy.route(least, fits, columns.available, look, prompt.sequence.committed, block_size)
        return None if choice is None else Offer(columns.groups[choice[0]], *seen[choice[0]][choice[1]])

    def _least_costs(self, prompt: Prompt, depths: policy.Ints, hits: policy.Ints) -> policy.Floats:
        """[groups] what each costs at least, in the best of its ways."""
        columns, block_size, rates = self._state.columns, self._state.config.block_size, self._state.rates
        tokens, source = prompt.sequence.committed, prompt.source
        there = columns.backlog, columns.running, prompt.blocks - depths - columns.free, block_size
        least = policy.least_costs(tokens - hits, *there)
        if source is not None and source.sender is not None:
            moving = np.maximum(0, source.blocks - depths) + columns.receiving + source.sender.sending
            work = policy.fetch_work(rates.fetch_cost, block_size, moving)
            least = np.minimum(least, policy.least_costs(tokens - source.tokens, *there, work))
        if hosts := {group_of(pool): depth for pool, depth in prompt.match.depths.items() if is_host(pool)}:
            in_host = columns.spread(hosts)
            work = policy.fetch_work(rates.load_cost, block_size, np.maximum(0, in_host - depths) + columns.receiving)
            least = np.minimum(least, policy.least_costs(tokens - in_host * block_size, *there, work))
        return least

    def _ways(self, group: ResidentGroup, prompt: Prompt) -> list[Way]:
        """The group as it is; and with what another, or its own host memory, has more of the prefix."""
        source, bare = prompt.source, self._load(group, prompt)
        ways: list[Way] = [(bare, None)]
        if source is None and not group.slots:
            return ways
        rates = self._state.rates
        if source is not None and source.sender is not None and len(source.sender.ports) == len(group.ports):
            ways += self._with(group, bare, source, prompt, group.receiving + source.sender.sending, rates.fetch_cost)
        if group.slots and (depth := prompt.match.depth(host_of(group.group))):
            host = Source(host_of(group.group), None, depth, None, depth * self._state.config.block_size)
            ways += self._with(group, bare, host, prompt, group.receiving, rates.load_cost)
        return ways

    def _with(
        self, group: ResidentGroup, bare: policy.GroupLoad, source: Source, prompt: Prompt, queued: int, cost: float
    ) -> list[Way]:
        """The group, once it has what `source` has, if that is enough more. queued: blocks that go there first.

        cost: of moving a token, in times to compute one.
        """
        block_size = self._state.config.block_size
        if source.sender is group or source.tokens - bare.hit_tokens < prompt.least:
            return []
        work = policy.fetch_work(cost, block_size, source.blocks - prompt.match.depth(group.group) + queued)
        return [(bare._replace(hit_tokens=source.tokens, fetch_work=work), source)]

    def _best_source(self, match: Match, parts: dict[GroupId, Part]) -> Source | None:
        """The group that could send the most of the prefix, of several the one with the lowest id; None if nobody could.

        A host tier is its own group's alone.
        """
        state, senders = self._state, self._state.columns.senders
        if not state.config.prefix_fetch or len(senders) < 2:
            return None
        depths = match.depths
        deepest = max((depth for pool, depth in depths.items() if pool in senders), default=0)
        pools = [pool for pool in parts if depths.get(pool, 0) == deepest and pool in senders]
        pool = max(
            (pool for pool in pools if state.table.may_hold(pool, parts[pool])),
            key=lambda pool: (parts[pool].tokens, -pool), default=None,
        )  # fmt: skip
        part = None if pool is None else parts[pool]
        if pool is None and deepest:
            pool = min(pool for pool, depth in depths.items() if depth == deepest and pool in senders)
        if pool is None:
            return None
        return Source(pool, senders[pool], deepest, part, deepest * state.config.block_size + (part.tokens if part else 0))

    def _load(self, group: ResidentGroup, prompt: Prompt) -> policy.GroupLoad:
        """What the group would have to spend on the sequence now."""
        table, depth, part = self._state.table, prompt.match.depths.get(group.group, 0), prompt.parts.get(group.group)
        pool, hit, revived = table.pools[group.group], 0, 0
        if depth:
            hit = depth * table.block_size
            revived = table.cached_in_match(group.group, prompt.match, depth)
        if part is not None:
            hit += part.tokens
        free, fetching = len(pool.free_stack), len(group.fetching)
        return policy.GroupLoad(  # by position, which is quicker: hit_tokens, new_blocks, ...
            hit, prompt.blocks - depth + revived, free, free + pool.cached, group.blocks, len(group.free_rows) - fetching,
            len(group.running) + fetching, group.coming if fetching else group.backlog, bool(group.starved), 0.0, revived,
        )  # fmt: skip

    def _why(self, prompt: Prompt) -> why.Decision:
        """Looks at every group that is large enough, those included that nobody had to look at."""
        sequence, now_s = prompt.sequence, self._state.now_s
        groups = [group for group in self._state.columns.groups if group.blocks >= sequence.blocks_at_most]
        ways = [(group, self._ways(group, prompt)) for group in groups if not group.draining]
        seen = [
            why.Seen(group.group, load, of_group[0][0].hit_tokens, source.pool if source else None)
            for group, of_group in ways
            for load, source in of_group
        ]
        best, *others = why.rank(seen, sequence.committed, self._state.config.block_size)
        return why.Decision(
            now_s, sequence.front_end, sequence.stream, sequence.committed, now_s - sequence.arrived_s,
            sequence.preemptions, 1 + len(others), best, others[0] if others else None,
        )  # fmt: skip

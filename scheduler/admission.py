"""How a waiting sequence starts: match, route, pin and reserve in one step. Route = allocate.

Imports `state`, `paging`, `policy` and the table.
"""

import numpy as np

from kvcache.index import Match, Part
from scheduler import policy
from scheduler.config import count_start
from scheduler.messages import ROW_BITS, Copy, LeaseId, Start
from scheduler.paging import Paging
from scheduler.resident import ResidentGroup
from scheduler.sequence import Sequence, State
from scheduler.state import ClusterState


class Admission:
    """Works on the shared state; its own are the serials of leases."""

    def __init__(self, state: ClusterState, paging: Paging) -> None:
        self._state = state
        self._paging = paging
        self._serials = 0

    def admit(self) -> None:
        """Starts waiting sequences, oldest first, until one finds no room. Route = allocate: one transaction on one table."""
        if not (self._state.waiting.queue and self._state.groups):
            return
        largest = max(group.blocks for group in self._state.groups.values())
        while (sequence := self._state.waiting.oldest(largest)) is not None:
            match = self._match(sequence)
            if self._defer(sequence, match):
                continue
            if not self._place(sequence, match):
                return
            self._state.waiting.leave(sequence)
            self._state.admitted.count(sequence.committed, self._state.now_s)

    def _match(self, sequence: Sequence) -> Match:
        """The cached prefix, in full pages."""
        limit = self._reusable_pages(sequence)
        sequence.hash_up_to(limit, self._state.config.page_size)
        return self._state.table.match(sequence.tokens, sequence.hashes, sequence.salt, limit)

    def _reusable_tokens(self, sequence: Sequence) -> int:
        """Tokens that a hit may cover: never the last one, which is always computed; none where the prompt's own
        log-probabilities are wanted."""
        if not self._state.config.prefix_caching or sequence.params.prompt_logprobs is not None:
            return 0
        return sequence.committed - 1

    def _reusable_pages(self, sequence: Sequence) -> int:
        return self._reusable_tokens(sequence) // self._state.config.page_size

    def _defer(self, sequence: Sequence, match: Match) -> bool:
        """Waits if what follows the cached prefix is about to be computed by a running sequence; see `prefixes`."""
        return self._state.config.wait_for_prefix and self._state.waiting.defer(
            sequence.hashes[len(match.nodes) : self._reusable_pages(sequence)]
        )

    def _place(self, sequence: Sequence, match: Match) -> bool:
        """Routes, pins the hit and reserves new pages in one step; False if there is no room anywhere now."""
        state = self._state
        groups = [
            group for group in state.groups.values() if group.blocks >= sequence.pages_at_most and not group.draining
        ]
        parts = state.table.parts(match, sequence.tokens, sequence.salt, self._reusable_tokens(sequence))
        pages = state.pages_for(sequence, sequence.committed)
        loads = [self._load(group, match, parts.get(group.group), pages) for group in groups]
        choice = policy.route(loads, sequence.committed, state.config.page_size)
        if choice is None:
            return False
        group, depth = groups[choice], match.depth(groups[choice].group)
        part = parts.get(group.group)
        blocks = state.table.reserve(group.group, match, depth, pages - depth, sequence.salt, part)
        assert blocks is not None, "policy admitted a sequence that the table has no room for"
        sequence.blocks = blocks
        if sequence.cached_tokens is None:
            self._count_start(sequence, match, depth, blocks.inherited)
        self._start(group, sequence, depth * state.config.page_size + blocks.inherited)
        return True

    def _count_start(self, sequence: Sequence, match: Match, depth: int, part_tokens: int) -> None:
        """Its first start."""
        state, known = self._state, len(match.nodes)
        sequence.cached_tokens = depth * state.config.page_size + part_tokens
        sequence.started_s = state.now_s
        candidates = sequence.hashes[known : self._reusable_pages(sequence)]
        count_start(
            state.counters, page_size=state.config.page_size, prompt_tokens=sequence.prompt_tokens, hit_pages=depth,
            known_pages=known, evicted_pages=state.table.evicted(candidates), candidate_pages=known + len(candidates),
            part_tokens=part_tokens,
        )  # fmt: skip

    def _load(self, group: ResidentGroup, match: Match, part: Part | None, pages: int) -> policy.GroupLoad:
        """What the group would have to spend on a sequence of `pages` pages now."""
        depth = match.depth(group.group)
        pool = self._state.table.pools[group.group]
        return policy.GroupLoad(
            hit_tokens=depth * self._state.config.page_size + (part.tokens if part else 0),
            new_pages=pages - depth + (self._state.table.cached_in_match(group.group, match, depth) if depth else 0),
            free=pool.free,
            available=pool.available,
            total=group.blocks,
            free_rows=len(group.free_rows),
            running=len(group.running),
            backlog=group.backlog,
            starving=bool(group.starved),
        )

    def _start(self, group: ResidentGroup, sequence: Sequence, cached_tokens: int) -> None:
        assert sequence.blocks is not None
        row = group.free_rows.pop()
        self._serials += 1
        sequence.state = State.RUNNING
        sequence.row = row
        sequence.lease = LeaseId(self._serials << ROW_BITS | row)
        group.starts += 1
        group.seat(sequence, row, sequence.lease, sequence.committed - cached_tokens)
        self._paging.schedule(group, sequence, row)
        if self._state.config.prefix_caching and self._state.config.wait_for_prefix:
            page_size = self._state.config.page_size
            full = (sequence.committed - 1) // page_size
            self._state.waiting.prefixes.announce(sequence, sequence.hashes[cached_tokens // page_size : full])
        group.issue(
            Start(
                lease=sequence.lease, tokens=sequence.tokens.tobytes(), prompt_tokens=sequence.prompt_tokens,
                cached_tokens=cached_tokens, blocks=np.array(sequence.blocks.blocks, np.int32).tobytes(),
                params=sequence.params, seed=sequence.seed, choice=sequence.choice, stop_ids=sequence.stop_ids,
                max_tokens=sequence.max_tokens,
            )
        )  # fmt: skip
        self._inherit(group, sequence, sequence.lease)

    def _inherit(self, group: ResidentGroup, sequence: Sequence, lease: LeaseId) -> None:
        """Where the hit ends inside a page: the copy that begins the sequence's own, unless it goes on in the page itself."""
        blocks, counters = sequence.blocks, self._state.counters
        assert blocks is not None
        if blocks.source is not None:
            group.issue(Copy(lease, blocks.source, blocks.blocks[len(blocks.nodes)], blocks.inherited))
            blocks.source = None
            counters.parts_copied += 1
        elif blocks.inherited:
            counters.parts_taken += 1

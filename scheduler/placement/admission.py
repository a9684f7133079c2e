"""How a waiting sequence starts: match, wait for a prefix or not, offers, cost, reserve, start. Route = allocate: one
transaction on one table. Reads from top to bottom.

Imports `state`, `routing`, `leases`, `policy` and the table.
"""

from collections.abc import Sequence as Listing
from typing import NamedTuple

import numpy as np

from kvcache.match import Match
from kvcache.table import SequenceBlocks
from scheduler import policy
from scheduler.config import count_start
from scheduler.placement.routing import Routing, Source
from scheduler.protocol.messages import Start
from scheduler.running import leases
from scheduler.running.prefixes import Promise
from scheduler.running.resident import ResidentGroup
from scheduler.running.transfers import Transfer
from scheduler.sequence import Sequence, State
from scheduler.state import ClusterState

MOST_TRIES = 4
"""Sequences that find no room in one event: each costs a match and a look at every group."""

MOST_PASSED = 8
"""Sequences that are passed over in one event, those included that need not be tried."""


class Newcomer(NamedTuple):
    """A waiting sequence, and what is there of its prefix. reusable: tokens that a hit may cover. match: its full blocks.

    peers: who fills, as it seems, the block that it needs next. blocks: at the start, those of the match included.
    """

    sequence: Sequence
    reusable: int
    match: Match
    peers: Listing[Sequence]
    blocks: int


class Admission:
    """Works on the shared state; its own are the columns of `Routing` and the serials of leases."""

    def __init__(self, state: ClusterState) -> None:
        self.routing = Routing(state)
        self._state = state
        self._serials = 0

    # ---- whose turn it is

    def admit(self) -> None:
        """Starts waiting sequences in the order of `WaitingRoom`.

        Those that find no room are passed over, within bounds: `MOST_TRIES` and `MOST_PASSED` in one event, and `skip_s` for
        the first. What a try has found out is remembered: nobody is tried twice while no room has come up, nor before as many
        blocks are available as it cannot do without.
        """
        state, waiting = self._state, self._state.waiting
        if state.deadlines.next_s <= state.now_s:
            leases.expire(state)
        if not (waiting.count and state.groups) or waiting.settled():
            return
        room: int | None = None
        passed: list[Sequence] = []
        tries = MOST_TRIES
        waiting.begin(state.now_s)
        while tries and len(passed) < MOST_PASSED and (sequence := waiting.take(state.largest_up)) is not None:
            if room is None and sequence.needs:
                room = self.routing.most_room()
            if sequence.tried != waiting.rooms and (room is None or sequence.needs <= room):
                newcomer = self._look(sequence)
                if newcomer.peers and (promise := self._promised(newcomer)) is not None:
                    waiting.defer(sequence)
                    state.prefixes.wait(sequence, promise)
                    continue
                if self._place(newcomer):
                    waiting.leave(sequence, state.now_s)
                    state.counters.skipped += bool(passed)
                    room = None
                    continue
                tries -= 1
                sequence.tried = waiting.rooms
                sequence.needs = newcomer.blocks - len(newcomer.match.nodes)
            passed.append(sequence)
            if not waiting.may_be_passed(sequence, state.now_s, first=len(passed) == 1):
                break
        waiting.put_back(passed, settled=tries > 0)

    def start_at_once(self, sequence: Sequence) -> bool:
        """Starts a newcomer past the queue if nobody waits, as it is mostly; False if it has to wait."""
        state, waiting = self._state, self._state.waiting
        if state.deadlines.next_s <= state.now_s:
            leases.expire(state)
        if waiting.count or not state.groups:
            return False
        newcomer = self._look(sequence)
        if newcomer.peers and self._promised(newcomer) is not None:
            return False
        waiting.fair.pass_by(sequence.tenant)
        return self._place(newcomer)

    def place_in(self, group: ResidentGroup, sequence: Sequence) -> None:
        """One that waits goes to this group now, if there is room; otherwise when and where its turn comes."""
        invited = group.alone is (sequence if sequence.suspect else None)
        if invited and sequence.state is State.WAITING and self._place(self._look(sequence), only=group):
            self._state.waiting.leave(sequence, self._state.now_s)

    # ---- match, and wait for what is in the making

    def _look(self, sequence: Sequence) -> Newcomer:
        """Finds the full blocks of its prefix, and who is about to compute the next one."""
        state, reusable = self._state, self._reusable(sequence)
        limit = reusable // state.block_size
        sequence.hash_up_to(limit, state.block_size)
        match = state.table.match(sequence.tokens, sequence.hashes, sequence.salt, limit)
        peers = state.prefixes.peers(sequence, len(match.nodes), reusable)
        blocks = sequence.blocks_for(sequence.committed + state.resolved.grant_ahead, state.block_size)
        return Newcomer(sequence, reusable, match, peers, blocks)

    def _reusable(self, sequence: Sequence) -> int:
        """Tokens that a hit may cover: never the last one, which is always computed; none where the prompt's own
        log-probabilities are wanted."""
        if not self._state.config.enable_prefix_caching or sequence.params.prompt_logprobs is not None:
            return 0
        return sequence.committed - 1

    def _promised(self, newcomer: Newcomer) -> Promise | None:
        """What is worth to be waited for: not if much else is computed before it, while another group would begin at once.
        Asked where there are peers."""
        sequence, reusable, match, peers, _ = newcomer
        prefixes, known = self._state.prefixes, len(match.nodes)
        if not self._state.config.wait_for_prefix:
            return None
        promise = prefixes.promised(sequence, known, reusable, peers)
        if promise is None or (queued := self.routing.least_backlog()) is None:
            return promise
        saved = promise.tokens - known * self._state.block_size
        return promise if policy.worth_waiting(prefixes.ahead_of(promise), saved, queued) else None

    # ---- offers, reserve, start

    def _place(self, newcomer: Newcomer, *, only: ResidentGroup | None = None) -> bool:
        """Takes the cheapest offer, pins the hit, reserves the rest; False if there is no room anywhere now. only: there."""
        state = self._state
        sequence, reusable, match, peers, needed = newcomer
        known = len(match.nodes)
        if peers:
            state.prefixes.show(sequence, known, peers)
        parts = state.table.parts(match, sequence.tokens, sequence.salt, reusable)
        offer = self.routing.cheapest(sequence, match, parts, needed, only)
        if offer is None:
            return False
        group, source = offer
        held, part = None, parts.get(group.group)
        if source is not None:  # pinned first: the reservation evicts, and a match is good until then
            held, part = state.table.hold(source.pool, match, source.depth, sequence.salt, source.part), None
        depth = match.depth(group.group)
        blocks = state.table.reserve(group.group, match, depth, needed - depth, sequence.salt, part, group.copy)
        assert blocks is not None, "policy admitted a sequence that the table has no room for"
        sequence.blocks = blocks
        if source is not None and held is not None:
            self._fetch(group, sequence, source, held, known)
            return True
        if blocks.inherited:
            state.counters.parts_copied += blocks.copied
            state.counters.parts_taken += not blocks.copied
        self._start(group, sequence, known, blocks.inherited)
        return True

    def _fetch(self, group: ResidentGroup, sequence: Sequence, source: Source, held: SequenceBlocks, known: int) -> None:
        """The sequence has its blocks; what `source` has of its prefix, `held`, is sent to them before it starts."""
        state = self._state
        assert sequence.blocks is not None
        sequence.state = State.FETCHING
        group.fetching[sequence] = sequence.committed - source.tokens
        state.prefixes.turn_to(sequence, source.depth)
        part = source.part.tokens if source.part else 0
        state.transfers.begin(sequence, held, sequence.blocks, part=part, known_blocks=known)

    def arrived(self, group: ResidentGroup, transfer: Transfer, *, ok: bool) -> None:
        """A fetch is over. The sequence that waits for it starts, and computes itself what has not arrived."""
        state, sequence = self._state, transfer.author
        blocks = sequence.blocks
        assert blocks is not None
        if group.closed:
            leases.leave(state, group, sequence)
            state.table.release(blocks)
            state.waiting.enter(sequence, state.now_s)
        else:
            del group.fetching[sequence]
            self._start(group, sequence, transfer.known_blocks, transfer.part if ok else 0)

    def _start(self, group: ResidentGroup, sequence: Sequence, known: int, part_tokens: int) -> None:
        """known: blocks of its prefix that some group has. part_tokens: of the hit, those after its whole blocks."""
        state, blocks = self._state, sequence.blocks
        assert blocks is not None
        depth = len(blocks.nodes)
        cached_tokens = depth * state.block_size + part_tokens
        if sequence.cached_tokens is None:
            sequence.cached_tokens, sequence.started_s = cached_tokens, state.now_s
            self._count(sequence, known, depth, part_tokens)
        if not sequence.charged:  # recomputing is not the tenant's doing
            sequence.tenant.served += sequence.committed - cached_tokens
            sequence.charged = sequence.committed
        self._serials += 1
        lease = group.seat(sequence, self._serials, cached_tokens)
        state.prefixes.turn_to(sequence, depth)
        group.issue(
            Start(
                lease=lease, tokens=sequence.tokens.tobytes(), prompt_tokens=sequence.prompt_tokens,
                cached_tokens=cached_tokens, blocks=np.array(blocks.blocks, np.int32).tobytes(),
                params=sequence.params, seed=sequence.seed, choice=sequence.choice, stop_ids=sequence.stop_ids,
                max_tokens=sequence.max_tokens,
            )
        )  # fmt: skip

    def _count(self, sequence: Sequence, known: int, depth: int, part_tokens: int) -> None:
        """Its first start."""
        state = self._state
        candidates = sequence.hashes[known : self._reusable(sequence) // state.block_size]
        count_start(
            state.counters, block_size=state.block_size, prompt_tokens=sequence.prompt_tokens, hit_blocks=depth,
            known_blocks=known, evicted_blocks=state.table.evicted(candidates), candidate_blocks=known + len(candidates),
            part_tokens=part_tokens,
        )  # fmt: skip

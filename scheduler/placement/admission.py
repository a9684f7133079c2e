"""How a waiting sequence starts: match, wait for a prefix or not, the cheapest way, reserve, start; and how a running one is
placed anew. Route = allocate: one transaction on one table. Reads from top to bottom.

Imports `state`, `routing`, `leases`, `policy` and the table.
"""

import math

from kvcache.ids import GroupId, group_of, narrow_of
from kvcache.match import Match, Part
from kvcache.table import SequenceBlocks
from scheduler import leases, policy
from scheduler.placement.routing import GroupRouter, Newcomer, Source
from scheduler.protocol.leaders import LeaseId, Moved
from scheduler.protocol.messages import Misses
from scheduler.state.cluster import ClusterState
from scheduler.state.prefixes import Promise
from scheduler.state.resident import ResidentGroup
from scheduler.state.sequence import Sequence, State
from scheduler.state.transfers import Transfer

MOST_TRIES = 4
"""Sequences that find no room in one event: each costs a match and a look at every group."""

MOST_PASSED = 8
"""Sequences that are passed over in one event, those included that need not be tried."""


class Admission:
    """Works on the shared state; its own are the columns of `GroupRouter` and the serials of leases."""

    def __init__(self, state: ClusterState) -> None:
        self.routing = GroupRouter(state)
        self._state = state
        self._serials = 0

    # ---- whose turn it is

    def welcome(self, sequences: list[Sequence]) -> bool:
        """The choices of a new request. A single one starts past the queue if nobody waits, as is usual. Whether to admit
        afterwards: somebody waits, or is late."""
        state = self._state
        started = len(sequences) == 1 and self._start_at_once(sequences[0])
        if not started:
            for sequence in sequences:
                state.waiting.enter(sequence, state.now_s)
        for sequence in sequences:
            if sequence.deadline_s < math.inf:
                state.deadlines.add(sequence)
        return not started or state.deadlines.next_s <= state.now_s

    def _start_at_once(self, sequence: Sequence) -> bool:
        state, waiting = self._state, self._state.waiting
        if state.deadlines.next_s <= state.now_s:
            leases.expire(state)
        if waiting.count or not state.groups:
            return False
        newcomer = self._look(sequence)
        if newcomer.promise is not None and self._worth_waiting(newcomer, newcomer.promise):
            return False
        waiting.fair.pass_by(sequence.tenant)
        return self._place(newcomer)

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
                if (promise := newcomer.promise) is not None and self._worth_waiting(newcomer, promise):
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
                sequence.needs = self._needs(newcomer)
            passed.append(sequence)
            if not waiting.may_be_passed(sequence, state.now_s, first=len(passed) == 1):
                break
        waiting.put_back(passed, settled=tries > 0)

    def _needs(self, newcomer: Newcomer) -> int:
        """Blocks that it cannot do without, wherever it goes."""
        window, known = self._state.window, len(newcomer.match.nodes)
        return newcomer.blocks - known if window is None else window.new_blocks(newcomer.blocks, known)

    def place_in(self, group: ResidentGroup, sequence: Sequence) -> None:
        """One that waits goes to this group now, if there is room; otherwise when and where its turn comes."""
        invited = group.alone is (sequence if sequence.suspect else None)
        if invited and sequence.state is State.WAITING and self._place(self._look(sequence), only=group):
            self._state.waiting.leave(sequence, self._state.now_s)

    # ---- match, and wait for what is in the making

    def _look(self, sequence: Sequence) -> Newcomer:
        """Finds the full blocks of its prefix, and who is about to compute the next one."""
        state, reusable = self._state, self._reusable(sequence)
        block_size, tokens = state.block_size, sequence.buffer[: sequence.committed]
        limit = reusable // block_size
        if len(sequence.hashes) < limit:
            sequence.hash_up_to(limit, block_size)
        match = state.table.index.match(tokens, sequence.hashes, sequence.salt, limit)
        peers, promise = state.prefixes.peers(sequence, len(match.nodes), reusable)
        blocks = min(-(-(len(tokens) + state.resolved.grant_ahead) // block_size), sequence.blocks_at_most)
        return Newcomer(sequence, tokens, reusable, match, peers, promise, blocks)

    def _reusable(self, sequence: Sequence) -> int:
        """Tokens that a hit may cover: never the last one, which is always computed; none where the prompt's own
        log-probabilities are wanted, or the mean of its hidden states: what is cached has neither."""
        of_all = sequence.params.prompt_logprobs is not None or sequence.pooling == "mean"
        if of_all or not self._state.config.enable_prefix_caching:
            return 0
        return sequence.committed - 1

    def _worth_waiting(self, newcomer: Newcomer, promise: Promise) -> bool:
        """Not if much else is computed before it, while another group would begin at once."""
        queued = self.routing.least_backlog()
        saved = promise.tokens - len(newcomer.match.nodes) * self._state.block_size
        return queued is None or policy.worth_waiting(self._state.prefixes.ahead_of(promise), saved, queued)

    # ---- reserve, fetch, start

    def _place(self, newcomer: Newcomer, *, only: ResidentGroup | None = None) -> bool:
        """Takes the cheapest way, pins the hit, reserves the rest; False if there is no room anywhere now. only: there."""
        state, sequence, match = self._state, newcomer.sequence, newcomer.match
        if newcomer.peers:
            state.prefixes.show(sequence, len(match.nodes), newcomer.peers)
        newcomer.parts = state.table.index.parts(match, newcomer.tokens, sequence.salt, newcomer.reusable)
        way = self.routing.cheapest(newcomer, only)
        if way is None:
            return False
        group, source = way
        part = newcomer.parts.get(group.group)
        held: list[SequenceBlocks] = []
        if source is not None:  # pinned first: the reservation evicts, and a match is good until then
            held, part = self._hold(source.pool, match, source.depth, sequence.salt, source.part), None
        depth, window = match.depth(group.group), state.window
        if source is not None and window is not None:
            new_blocks = window.to_bring(newcomer.blocks, source.depth)
            blocks = state.table.reserve_window(group.group, source.depth, new_blocks, sequence.salt)
        else:
            new_blocks = newcomer.blocks - depth if window is None else window.new_blocks(newcomer.blocks, depth)
            blocks = state.table.reserve(group.group, match, depth, new_blocks, sequence.salt, part, group.copy)
        assert blocks is not None, "policy admitted a sequence that the table has no room for"
        sequence.blocks = blocks
        if state.narrow is not None:
            sequence.narrow = self._reserve_narrow(newcomer, blocks, source)
        if source is not None:
            self._fetch(group, sequence, source, held, len(match.nodes))
            return True
        if blocks.inherited:
            state.counters.parts_copied += blocks.copied
            state.counters.parts_taken += not blocks.copied
        self._start(group, sequence, len(match.nodes), blocks.inherited)
        return True

    def _reserve_narrow(self, newcomer: Newcomer, blocks: SequenceBlocks, source: Source | None) -> SequenceBlocks:
        """Of narrow layers, beside its other blocks: on the same match, or for a window that is brought."""
        state, table, narrow, pool = self._state, self._state.table, self._state.narrow, narrow_of(blocks.group)
        assert narrow is not None
        if source is not None:
            new_blocks = narrow.to_bring(newcomer.blocks, source.depth)
            reserved = table.reserve_window(pool, source.depth, new_blocks, blocks.salt)
        else:
            new_blocks, copy = narrow.new_blocks(newcomer.blocks, len(blocks.nodes)), state.groups[blocks.group].copy_narrow
            reserved = table.reserve_beside(blocks, newcomer.match, new_blocks, newcomer.parts.get(pool), copy)
        assert reserved is not None, "policy admitted a sequence that the table has no room for"
        return reserved

    def _hold(self, pool: GroupId, match: Match, depth: int, salt: str, part: Part | None = None) -> list[SequenceBlocks]:
        """Pins what a pool has of a match, to be sent: of each kind of layer."""
        table = self._state.table
        held = [table.hold(pool, match, depth, salt, part)]
        return held if self._state.narrow is None else [*held, table.hold(narrow_of(pool), match, depth, salt)]

    def _fetch(self, group: ResidentGroup, sequence: Sequence, source: Source, held: list[SequenceBlocks], known: int) -> None:
        """The sequence has its blocks; what `source` has of its prefix, `held`, is sent to them before it starts."""
        state = self._state
        assert sequence.blocks is not None
        sequence.state = State.FETCHING
        group.fetching[sequence] = sequence.committed - source.tokens
        state.prefixes.turn_to(sequence, source.depth)
        part = source.part.tokens if source.part else 0
        for read, written in zip(held, sequence.tables, strict=True):
            state.transfers.begin(sequence, read, written, part=part, known_blocks=known)

    def moved(self, group: ResidentGroup, moved: Moved) -> None:
        """A group has done its part of a transfer, or could not. Admit afterwards: blocks may have become free."""
        transfer = self._state.transfers.answered(group, moved)
        if transfer is not None:
            self._arrived(group, transfer, ok=moved.ok)
        self._state.waiting.made_room()
        if group.starved:  # those may wait for nothing else
            leases.extend(self._state, group)

    def _arrived(self, group: ResidentGroup, transfer: Transfer, *, ok: bool) -> None:
        """Who waits for it starts, and computes itself what has not arrived; who moves follows."""
        state, sequence = self._state, transfer.author
        if not state.transfers.settle(transfer, ok=ok):
            if transfer.moves is not None and ok and not state.transfers.expected(sequence):
                self._follow(sequence, transfer.moves, group_of(transfer.target))
            return
        assert sequence.blocks is not None
        sequence.brought = ok or not (sequence.blocks.first or sequence.narrow)
        if group.closed or not sequence.brought:  # without what it sees it cannot begin there
            leases.leave(state, group, sequence)
            state.waiting.enter(sequence, state.now_s)
        elif not state.transfers.expected(sequence):
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
            sequence.misses = self._count(sequence, known, depth, part_tokens)
            state.outbox.started(sequence)
        if not sequence.charged:  # recomputing is not the tenant's doing
            sequence.tenant.served += sequence.committed - cached_tokens
            sequence.charged = sequence.committed
        self._serials, sequence.brought = self._serials + 1, True
        group.seat(sequence, self._serials, cached_tokens)
        state.prefixes.turn_to(sequence, depth)

    def _count(self, sequence: Sequence, known: int, depth: int, part_tokens: int) -> Misses:
        """Its first start: where each token of its prompt comes from, or why it has to be computed."""
        state, counters, block_size = self._state, self._state.counters, self._state.block_size
        could_hit = self._reusable(sequence) // block_size
        routed, evicted = known - depth, state.table.evicted(sequence.hashes[known:could_hit])
        cold, inside_block = could_hit - known - evicted, sequence.prompt_tokens - could_hit * block_size
        misses = Misses(
            routed=routed * block_size - (part_tokens if routed else 0),
            evicted=evicted * block_size - (part_tokens if evicted and not routed else 0),
            cold=cold * block_size - (part_tokens if cold and not (routed or evicted) else 0),
            inside_block=inside_block - (0 if routed or evicted or cold else part_tokens),
        )
        counters.started_tokens += sequence.prompt_tokens
        counters.cached_tokens += depth * block_size + part_tokens
        counters.part_tokens += part_tokens
        counters.miss_routed += misses.routed
        counters.miss_evicted += misses.evicted
        counters.miss_cold += misses.cold
        counters.miss_inside_block += misses.inside_block
        if depth and not routed:
            counters.routed_by_prefix += 1
        else:
            counters.routed_by_load += 1
        return misses

    # ---- a running one is placed anew

    def move(self, group: ResidentGroup, sequence: Sequence) -> bool:
        """Lets a running sequence move to the least loaded group that has room for it: what it has published goes ahead, while
        it decodes on. Once that has arrived it stops, the rest is fetched, and it starts there.

        After Llumnix (arXiv 2406.03243), whose last stage is the stop here too. False if there is no such group: nothing has
        changed then. True also if it is on its way already.
        """
        table, transfers, blocks, lease = self._state.table, self._state.transfers, sequence.blocks, sequence.lease
        assert blocks is not None
        assert lease is not None
        if transfers.moving(sequence):
            return True
        target = self._target(group, sequence)
        if target is None:
            return False
        match = table.index.chain(blocks.nodes)
        depth, published = match.depth(target), len(match.nodes)
        if depth == published:
            self._follow(sequence, lease, target)
            return True
        held = self._hold(group.group, match, published, blocks.salt)
        if self._state.window is None:
            ahead = [table.reserve(target, match, depth, published - depth, blocks.salt)]
        else:
            ahead = [self._reserve_seen(target, published, blocks.salt)]
        if self._state.narrow is not None:
            ahead.append(self._reserve_seen(narrow_of(target), published, blocks.salt))
        for read, written in zip(held, ahead, strict=True):
            assert written is not None, "the target was chosen for its room"
            transfers.begin(sequence, read, written, moves=lease)
        return True

    def _reserve_seen(self, pool: GroupId, depth: int, salt: str) -> SequenceBlocks | None:
        """Room for what is seen after so many blocks."""
        table = self._state.table
        return table.reserve_window(pool, depth, depth - table.first_seen(pool, depth), salt)

    def _follow(self, sequence: Sequence, lease: LeaseId, target: GroupId) -> None:
        """What went ahead has arrived. The sequence stops where it runs and starts in `target`; if that has no room any more,
        it waits for its turn like others."""
        state = self._state
        group = state.group_of(sequence)
        if sequence.lease != lease or group is None or target not in state.groups:
            return  # it has ended, or was restarted, meanwhile
        state.counters.migrations += 1
        leases.interrupt(state, group, sequence)
        leases.extend(state, group)  # others there may have waited for its blocks
        self.place_in(state.groups[target], sequence)

    def _target(self, group: ResidentGroup, sequence: Sequence) -> GroupId | None:
        """The least loaded group that has room for it."""
        wanted = [len(each.held) for each in sequence.tables]
        able = [
            (other.coming + len(other.running), other.group)
            for other in self._state.groups.values()
            if other is not group and not (other.closed or other.starved) and len(other.ports) == len(group.ports) > 0
            and other.blocks >= sequence.blocks_at_once and other.rows_left > 0
            and all(
                self._state.table.pools[pool].available > blocks
                for pool, blocks in zip((other.group, narrow_of(other.group)), wanted, strict=False)
            )
        ]  # fmt: skip
        return min(able)[1] if able else None

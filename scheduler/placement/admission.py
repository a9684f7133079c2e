"""How a waiting sequence starts: match, route, pin and reserve in one step. Route = allocate.

Imports `state`, `routing`, `paging`, `transfers` and the table.
"""

import numpy as np

from kvcache.ids import is_host
from kvcache.table import SequenceBlocks
from scheduler.config import count_start
from scheduler.placement.routing import Routing, Source
from scheduler.placement.sharing import Newcomer, Sharing
from scheduler.protocol.messages import ROW_BITS, Copy, Drop, Failure, FinishReason, LeaseId, Start
from scheduler.running.paging import Paging
from scheduler.running.resident import ResidentGroup
from scheduler.running.transfers import Transfer, Transfers
from scheduler.sequence import Sequence, State
from scheduler.state import ClusterState

MOST_TRIES = 4
"""Sequences that find no room in one event: each costs a match and a look at every group."""

MOST_PASSED = 8
"""Sequences that are passed over in one event, those included that need not be tried."""


class Admission:
    """Works on the shared state; its own are the serials of leases."""

    def __init__(self, state: ClusterState, paging: Paging, transfers: Transfers) -> None:
        self._state = state
        self._paging = paging
        self._transfers = transfers
        self._routing = Routing(state)
        self._sharing = Sharing(state)
        self._serials = 0

    def admit(self) -> None:
        """Starts waiting sequences in the order of `WaitingRoom`. Route = allocate: one transaction on one table.

        Those that find no room are passed over, within bounds: `MOST_TRIES` and `MOST_PASSED` in one event, and `skip_s` for
        the first. What a try has found out is remembered: nobody is tried twice while no room has come up, nor before as many
        blocks are available as it cannot do without.
        """
        self._expire()
        state, waiting = self._state, self._state.waiting
        if not (waiting.count and state.groups) or waiting.settled():
            return
        room: int | None = None
        passed: list[Sequence] = []
        tries = MOST_TRIES
        waiting.begin(state.now_s)
        while tries and len(passed) < MOST_PASSED and (sequence := waiting.take(state.largest_up)) is not None:
            if room is None and sequence.needs:
                room = state.columns.most_room()
            if sequence.tried != waiting.rooms and (room is None or sequence.needs <= room):
                newcomer = self._sharing.look(sequence)
                if (promise := self._sharing.promised(newcomer)) is not None:
                    waiting.defer(sequence, promise.author, promise.blocks)
                    continue
                if self._place(newcomer):
                    waiting.leave(sequence, state.now_s)
                    state.counters.skipped += bool(passed)
                    room = None
                    continue
                tries -= 1
                sequence.tried = waiting.rooms
                sequence.needs = state.blocks_for(sequence, sequence.committed) - len(newcomer.match.nodes)
            passed.append(sequence)
            if not waiting.may_be_passed(sequence, state.now_s, first=len(passed) == 1):
                break
        waiting.put_back(passed, settled=tries > 0)

    def start_at_once(self, sequence: Sequence) -> bool:
        """Starts a newcomer past the queue if nobody waits, as it is mostly; False if it has to wait."""
        self._expire()
        waiting = self._state.waiting
        if waiting.count or not self._state.groups:
            return False
        newcomer = self._sharing.look(sequence)
        if self._sharing.promised(newcomer) is not None:
            return False
        waiting.fair.pass_by(sequence.tenant)
        return self._place(newcomer)

    def _expire(self) -> None:
        """Ends those whose deadline has passed, whether they wait or run."""
        state = self._state
        while (sequence := state.deadlines.passed(state.now_s)) is not None:
            state.counters.expired += 1
            group, output = state.group_of(sequence), sequence.committed - sequence.prompt_tokens
            if group is not None and sequence.lease is not None:
                output = group.output_tokens(sequence)
                group.issue(Drop(sequence.lease))
                self._paging.leave(group, sequence)
            elif group is not None:
                self.give_up_fetch(group, sequence)
            given_s = sequence.deadline_s - sequence.arrived_s
            where = f"it has {output} tokens of output" if sequence.cached_tokens is not None else "it has not begun"
            message = f"the request did not end within {given_s:g} s: {where}"
            state.finish(sequence, FinishReason.FAILED, output, message, Failure.TIMED_OUT)
            if group is not None:
                self._paging.extend(group, [])

    def place_in(self, group: ResidentGroup, sequence: Sequence) -> None:
        """One that waits goes to this group now, if there is room; otherwise when and where its turn comes."""
        if sequence.state is not State.WAITING:
            return
        if self._place(self._sharing.look(sequence), only=group):
            self._state.waiting.leave(sequence, self._state.now_s)

    def _place(self, newcomer: Newcomer, *, only: ResidentGroup | None = None) -> bool:
        """Routes, pins the hit and reserves new blocks in one step; False if there is no room anywhere now. only: there."""
        state, block_size = self._state, self._state.config.block_size
        sequence, reusable, match, peers = newcomer
        if peers:
            self._sharing.show(newcomer)
        parts = state.table.parts(match, sequence.tokens, sequence.salt, reusable)
        offer = self._routing.cheapest(sequence, match, parts, only)
        if offer is None:
            return False
        group, _, source = offer
        depth, needed = match.depth(group.group), state.blocks_for(sequence, sequence.committed)
        held = part = None
        if source is None:
            part = parts.get(group.group)
        else:  # pinned first: the reservation evicts, and a match is good until then
            held = state.table.hold(source.pool, match, source.depth, sequence.salt, source.part)
        blocks = state.table.reserve(group.group, match, depth, needed - depth, sequence.salt, part)
        assert blocks is not None, "policy admitted a sequence that the table has no room for"
        sequence.blocks = blocks
        if source is not None and held is not None:
            self._fetch(group, sequence, source, held, len(match.nodes))
            return True
        if sequence.cached_tokens is None:
            self._count_start(sequence, len(match.nodes), depth, blocks.inherited)
        self._start(group, sequence, depth * block_size + blocks.inherited)
        return True

    # ---- a prefix that is fetched first

    def _fetch(self, group: ResidentGroup, sequence: Sequence, source: Source, held: SequenceBlocks, known: int) -> None:
        """The sequence has its blocks; what `source` has of its prefix, `held`, is sent to them before it starts."""
        assert sequence.blocks is not None
        sequence.state = State.FETCHING
        group.fetching[sequence] = sequence.committed - source.tokens
        self._state.open_blocks.turn_to(sequence, source.depth)
        part = source.part.tokens if source.part else 0
        self._transfers.begin(sequence, held, sequence.blocks, part=part, known_blocks=known)

    def arrive(self, group: ResidentGroup, transfer: Transfer, *, ok: bool) -> None:
        """A fetch is over. The sequence that waits for it starts, and computes itself what has not arrived."""
        state, block_size = self._state, self._state.config.block_size
        blocks, sequence, awaited = transfer.blocks, transfer.author, transfer.awaited
        assert blocks is not None
        self._transfers.arrived(transfer)
        self._count_transfer(transfer, ok)
        if ok:
            for index in range(transfer.first, transfer.tokens_end):
                state.table.publish(blocks, sequence.content_of(index, block_size), sequence.hashes[index])
        if not awaited:
            state.table.release(blocks)
        elif group.draining:
            self.give_up_fetch(group, sequence)
            state.table.release(blocks)
            state.waiting.enter(sequence, state.now_s)
        else:
            group.fetching.pop(sequence, None)
            part = transfer.part if ok else 0
            if sequence.cached_tokens is None:
                self._count_start(sequence, transfer.known_blocks, len(blocks.nodes), part)
            self._start(group, sequence, len(blocks.nodes) * block_size + part)

    def _count_transfer(self, transfer: Transfer, ok: bool) -> None:
        counters = self._state.counters
        tokens = (transfer.tokens_end - transfer.first) * self._state.config.block_size + transfer.part
        if not ok:
            counters.failed_transfers += 1
        elif is_host(transfer.target):
            counters.offloaded_tokens += tokens
        elif is_host(transfer.source):
            counters.loads += 1
            counters.loaded_tokens += tokens
        else:
            counters.fetches += 1
            counters.fetched_tokens += tokens

    def give_up_fetch(self, group: ResidentGroup, sequence: Sequence) -> None:
        """The sequence does not wait for its prefix any more; its blocks stay with the transfer until that is over."""
        group.fetching.pop(sequence, None)
        group.touch()
        sequence.blocks = None
        self._state.open_blocks.close(sequence)
        self._state.waiting.withdraw(sequence)

    # ---- the start

    def _count_start(self, sequence: Sequence, known: int, depth: int, part_tokens: int) -> None:
        """Its first start. known: blocks of its prefix that some group has."""
        state = self._state
        sequence.cached_tokens = depth * state.config.block_size + part_tokens
        sequence.started_s = state.now_s
        candidates = sequence.hashes[known : self._sharing.reusable(sequence) // state.config.block_size]
        count_start(
            state.counters, block_size=state.config.block_size, prompt_tokens=sequence.prompt_tokens, hit_blocks=depth,
            known_blocks=known, evicted_blocks=state.table.evicted(candidates), candidate_blocks=known + len(candidates),
            part_tokens=part_tokens,
        )  # fmt: skip

    def _start(self, group: ResidentGroup, sequence: Sequence, cached_tokens: int) -> None:
        assert sequence.blocks is not None
        row = group.free_rows.pop()
        self._serials += 1
        if not sequence.charged:  # recomputing is not the tenant's doing
            sequence.tenant.served += sequence.committed - cached_tokens
            sequence.charged = sequence.committed
        sequence.state = State.RUNNING
        sequence.row = row
        sequence.lease = LeaseId(self._serials << ROW_BITS | row)
        group.starts += 1
        group.seat(sequence, row, sequence.lease, sequence.committed - cached_tokens)
        full = cached_tokens // self._state.config.block_size
        self._paging.schedule(group, sequence, row, sequence.committed, full)
        self._state.open_blocks.turn_to(sequence, full)
        self._inherit(group, sequence.blocks)
        group.issue(
            Start(
                lease=sequence.lease, tokens=sequence.tokens.tobytes(), prompt_tokens=sequence.prompt_tokens,
                cached_tokens=cached_tokens, blocks=np.array(sequence.blocks.blocks, np.int32).tobytes(),
                params=sequence.params, seed=sequence.seed, choice=sequence.choice, stop_ids=sequence.stop_ids,
                max_tokens=sequence.max_tokens,
            )
        )  # fmt: skip

    def _inherit(self, group: ResidentGroup, blocks: SequenceBlocks) -> None:
        """Where the hit ends inside a block: the copy that begins the sequence's own, unless it goes on in the block itself."""
        if blocks.source is not None:
            group.issue(Copy(blocks.source, blocks.blocks[len(blocks.nodes)], blocks.inherited))
            blocks.source = None
            self._state.counters.parts_copied += 1
        elif blocks.inherited:
            self._state.counters.parts_taken += 1

"""The one owner: every block and every sequence of the cluster, and each decision about them.

Plain Python and NumPy; no Ray, no torch, no clock. Every call is synchronous, hence atomic: the shell around it (an actor,
a lock, a simulator) sets `now_s`, calls in, then delivers what each group's `drain` and then `outbox.drain` hand out.

    submit ──▶ waiting ──admit: route, pin, reserve──▶ running ──report: commit, publish, grant──▶ ended
                  ▲                                        │
                  └─────────── preempt, group_down ────────┘
"""

import random

import msgspec
import numpy as np

from kvcache.hashing import hash_pages
from kvcache.ids import GroupId
from kvcache.index import Match
from kvcache.table import BlockTable, SequenceBlocks
from scheduler import policy
from scheduler.config import CoreConfig, Counters, count_start
from scheduler.limits import RequestRefused, output_limit, pages_for, queue_room
from scheduler.messages import (
    NO_TOKEN,
    ROW_BITS,
    ROW_MASK,
    Drop,
    Failure,
    FinishReason,
    Grant,
    LeaseId,
    Remap,
    Report,
    Request,
    Start,
)
from scheduler.outbox import Outbox
from scheduler.pace import Pace
from scheduler.resident import ProtocolError, ResidentGroup
from scheduler.sequence import Sequence, State
from scheduler.waiting import WaitingRoom

PRIORITY_SHIFT = 48
"""Arrivals that fit between two priorities."""

GAVE_UP = "its worker could not go on with it: the worker's log says why"


class SchedulerCore:
    """Sequences, groups and the global block table; see the module's picture.

    Invariants are written out and checked in `scheduler.invariants`.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        self.now_s = 0.0  # when the event that is being handled happened, by the shell's clock
        self.table = BlockTable(config.page_size)
        self.groups: dict[GroupId, ResidentGroup] = {}
        self.expected: dict[GroupId, int] = {}
        self.sequences: dict[tuple[int, int], Sequence] = {}
        self.counters = Counters()
        self.outbox = Outbox()  # drained by the shell after each call, after the groups' logs
        self._epochs: dict[GroupId, int] = {}
        self.waiting = WaitingRoom()
        self.computed = Pace()  # tokens, prefilled and decoded, in all groups
        self.admitted = Pace()  # tokens that waited and wait no more
        self._random = random.Random(config.seed)
        self._numbers = 0
        self._serials = 0
        self._lost = ""  # why the last group went for good

    # ---- groups -------------------------------------------------------------------------------------------------------

    def expect(self, group: GroupId, blocks: int = 0) -> None:
        """A group is coming up (or back): requests wait for it instead of failing. blocks: its pages, if known."""
        self.expected[group] = blocks

    def group_up(self, group: GroupId, epoch: int, blocks: int, rows: int) -> None:
        """A group's workers are ready, with empty pools. A former epoch of it is down from now on.

        Errors: ProtocolError for an epoch that is not newer than the last one.
        """
        if epoch <= self._epochs.get(group, -1):
            raise ProtocolError(f"group {group} came up with epoch {epoch}, but {self._epochs[group]} was seen: a stale worker")
        if group in self.groups:
            self.group_down(group, "replaced by a newer epoch", returning=True)
        self._epochs[group] = epoch
        self.expected.pop(group, None)
        self.table.add_group(group, blocks)
        self.groups[group] = ResidentGroup(group, epoch, blocks, rows, self.config.page_size)
        self._reconsider("the pools of the groups that are up are too small")
        self._admit()

    def group_down(self, group: GroupId, reason: str, *, returning: bool = False) -> None:
        """A group is lost with its KV. Its sequences wait again, from their committed tokens on.

        returning: a replacement is on its way. Otherwise sequences that fit no other group fail with `reason`.
        Also called for a group that was only expected and will not come.
        """
        lost = self.groups.pop(group, None)
        if returning:
            self.expected[group] = lost.blocks if lost else 0
        else:
            self.expected.pop(group, None)
            self._lost = reason
        if lost is not None:
            for sequence in sorted(lost.running):
                lost.write_back(sequence)
                self._leave(lost, sequence, release=False)
                self.waiting.enter(sequence)
            self.table.remove_group(group)
        self._reconsider(reason)
        self._admit()

    def drain(self, group: GroupId) -> bool:
        """The group takes no more sequences, so that it can be removed once nobody runs there.

        False, and nothing has changed, if it is the last one that takes any, or the only one large enough for some sequence.
        """
        rest = [other.blocks for name, other in self.groups.items() if name != group and not other.draining]
        needed = max((sequence.pages_at_most for sequence in self.sequences.values()), default=0)
        if group not in self.groups or not rest or max(rest) < needed:
            return False
        self.groups[group].draining = True
        return True

    def vacate(self, group: GroupId) -> None:
        """Those that still run in a draining group start again elsewhere, from their committed tokens on."""
        for sequence in sorted(self.groups[group].running, reverse=True):
            self._preempt(self.groups[group], sequence)
        self._admit()

    # ---- front ends ---------------------------------------------------------------------------------------------------

    def submit(self, front_end: int, request: Request) -> None:
        """Takes a request in; it starts at once if there is room.

        Errors: RequestRefused if it can never fit or the queue is full, ProtocolError if a stream of it is in use; nothing has
        changed then.
        """
        prompt = np.frombuffer(request.tokens, np.int32)
        page_size = self.config.page_size
        max_tokens = output_limit(
            len(prompt), request.params.max_tokens, self.config.max_model_len, page_size, self._largest_pool(), self._lost
        )
        if not (self.groups or self.config.wait_for_groups):
            raise RequestRefused("no group of workers is ready yet: try again soon", Failure.UNAVAILABLE, retry_after_s=1.0)
        self._require_room(request.params.n, len(prompt))
        pages = pages_for(len(prompt) + max_tokens - 1, page_size)
        hashes: list[int] = np.frombuffer(request.hashes, np.uint64).tolist()
        if len(hashes) != len(prompt) // page_size:
            hashes = hash_pages(prompt, page_size, request.salt)
        if any((front_end, request.stream + choice) in self.sequences for choice in range(request.params.n)):
            raise ProtocolError(f"front end {front_end} submitted stream {request.stream}, which has not ended")
        seed = request.params.seed
        if seed is None:
            seed = self._random.getrandbits(63)
        for choice in range(request.params.n):
            params = request.params
            if choice and params.prompt_logprobs is not None:  # the first choice measures the prompt for all
                params = msgspec.structs.replace(params, prompt_logprobs=None)
            sequence = Sequence(
                number=self._numbers, place=(request.priority << PRIORITY_SHIFT) + self._numbers, arrived_s=self.now_s,
                front_end=front_end, stream=request.stream + choice, choice=choice, params=params, seed=seed,
                stop_ids=request.stop_ids, salt=request.salt, prompt_tokens=len(prompt), max_tokens=max_tokens,
                pages_at_most=pages, hashes=hashes if choice == 0 else hashes.copy(), buffer=prompt, committed=len(prompt),
            )  # fmt: skip
            self._numbers += 1
            self.sequences[front_end, sequence.stream] = sequence
            self.waiting.enter(sequence)
        self.counters.requests += 1
        self.counters.prompt_tokens += len(prompt)
        self._admit()

    def _require_room(self, choices: int, tokens: int) -> None:
        """Errors: RequestRefused if so many more may not wait."""
        try:
            queue_room(self.config, self.waiting, choices, choices * tokens, self.admitted.per_s(self.now_s))
        except RequestRefused:
            self.counters.refused += 1
            raise

    def abort(self, front_end: int, stream: int) -> None:
        """The client went away: its blocks are free at once. A stream that has ended already is left alone."""
        self._finish_early(front_end, stream, FinishReason.ABORTED)

    def end(self, front_end: int, stream: int, keep_tokens: int) -> None:
        """The front end found a stop string after `keep_tokens` output tokens. The first end to be committed wins."""
        self._finish_early(front_end, stream, FinishReason.STOP, keep_tokens)

    def front_end_down(self, front_end: int) -> None:
        """A front end is gone: all its requests are aborted, the youngest first, so that none starts only to be aborted."""
        for owner, stream in [key for key in reversed(self.sequences) if key[0] == front_end]:
            self.abort(owner, stream)
        self.outbox.forget(front_end)

    # ---- reports ------------------------------------------------------------------------------------------------------

    def report(self, group_id: GroupId, report: Report) -> None:
        """Commits what a group's steps did: tokens, published pages, ends; then grants, and admits who fits now.

        A report of a stale epoch is discarded whole, tokens of ended leases one by one: the cut is what this call commits.
        Errors: ProtocolError for a gap in the stream.
        """
        group = self.groups.get(group_id)
        if group is None or report.epoch != group.epoch:
            return
        if report.number != group.reports:
            raise ProtocolError(f"group {group_id} sent report {report.number}, expected {group.reports}: fence it")
        if not 1 <= report.steps <= self.config.page_size:  # the ring holds a page and one report
            at_most = self.config.page_size
            raise ProtocolError(f"group {group_id} sent a report of {report.steps} steps, not 1 to {at_most}: fence it")
        group.reports += 1
        group.applied = report.applied
        group.steps += report.steps
        group.step_s += report.elapsed_s
        due = self._commit(group, report)
        for lease, payload in report.logprobs:
            if (sequence := self._holder(group, lease)) is not None:
                self.outbox.logprobs(sequence, payload)
        if not (due or report.finished):
            return  # nothing that could let anyone publish, grow or start
        needy = [
            sequence
            for row in due
            if (sequence := group.sequences[row]) is not None and self._advance(group, sequence, row)
        ]
        for lease, reason in report.finished:
            if (sequence := self._holder(group, lease)) is not None:
                output = group.output_tokens(sequence)
                self._leave(group, sequence)
                self._finish(sequence, FinishReason(reason), output, GAVE_UP if reason == FinishReason.FAILED else "")
        self._extend(group, needy)
        self._admit()

    def _commit(self, group: ResidentGroup, report: Report) -> list[int]:
        """The report's tokens become true, and are on their way to the front ends. Returns the rows that are due."""
        roster = group.roster(report.leases)
        columns = roster.columns
        tokens = np.frombuffer(report.tokens, np.int32).reshape(report.steps, -1)
        if columns is not None:
            tokens = tokens.take(columns, axis=1)
        if not report.computed:
            due = group.commit_decodes(roster, tokens)
            self.counters.output_tokens += tokens.size
            size = tokens.size
        else:
            computed = np.frombuffer(report.computed, np.int32)
            computed = computed if columns is None else computed.take(columns)
            due = group.commit_mixed(roster, tokens, computed)
            self.counters.output_tokens += int(np.count_nonzero(tokens != NO_TOKEN))
            size = int(computed.sum())
        group.step_tokens += size
        self.computed.count(size, self.now_s)
        self.outbox.tokens(roster.audience, tokens)
        return due

    # ---- admission ----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Starts waiting sequences, oldest first, until one finds no room. Route = allocate: one transaction on one table."""
        if not (self.waiting.queue and self.groups):
            return
        largest = max(group.blocks for group in self.groups.values())
        while (sequence := self.waiting.oldest(largest)) is not None:
            match = self._match(sequence)
            if self._defer(sequence, match):
                continue
            if not self._place(sequence, match):
                return
            self.waiting.leave(sequence)
            self.admitted.count(sequence.committed, self.now_s)

    def _match(self, sequence: Sequence) -> Match:
        """The cached prefix, in full pages. The last token is always computed, so it is never part of it."""
        limit = self._reusable_pages(sequence)
        sequence.hash_up_to(limit, self.config.page_size)
        return self.table.match(sequence.tokens, sequence.hashes, sequence.salt, limit)

    def _reusable_pages(self, sequence: Sequence) -> int:
        """Full pages that a hit may cover; none where the prompt's own log-probabilities are wanted."""
        if not self.config.prefix_caching or sequence.params.prompt_logprobs is not None:
            return 0
        return (sequence.committed - 1) // self.config.page_size

    def _defer(self, sequence: Sequence, match: Match) -> bool:
        """Waits if what follows the cached prefix is about to be computed by a running sequence; see `prefixes`."""
        return self.config.wait_for_prefix and self.waiting.defer(
            sequence.hashes[len(match.nodes) : self._reusable_pages(sequence)]
        )

    def _place(self, sequence: Sequence, match: Match) -> bool:
        """Routes, pins the hit and reserves new pages in one step; False if there is no room anywhere now."""
        groups = [
            group for group in self.groups.values() if group.blocks >= sequence.pages_at_most and not group.draining
        ]
        pages = self._pages_for(sequence, sequence.committed)
        loads = [self._load(group, match, pages) for group in groups]
        choice = policy.route(loads, sequence.committed, self.config.page_size)
        if choice is None:
            return False
        group, depth = groups[choice], loads[choice].hit_pages
        blocks = self.table.reserve(group.group, match, depth, pages - depth, sequence.salt)
        assert blocks is not None, "policy admitted a sequence that the table has no room for"
        sequence.blocks = blocks
        if sequence.cached_tokens is None:
            sequence.cached_tokens = depth * self.config.page_size
            sequence.started_s = self.now_s
            candidates = sequence.hashes[len(match.nodes) : self._reusable_pages(sequence)]
            count_start(
                self.counters, page_size=self.config.page_size, prompt_tokens=sequence.prompt_tokens, hit_pages=depth,
                known_pages=len(match.nodes), evicted_pages=self.table.evicted(candidates),
                candidate_pages=len(match.nodes) + len(candidates),
            )  # fmt: skip
        self._start(group, sequence, depth * self.config.page_size)
        return True

    def _load(self, group: ResidentGroup, match: Match, pages: int) -> policy.GroupLoad:
        """What the group would have to spend on a sequence of `pages` pages now."""
        depth = match.depth(group.group)
        pool = self.table.pools[group.group]
        return policy.GroupLoad(
            hit_pages=depth,
            new_pages=pages - depth + (self.table.cached_in_match(group.group, match, depth) if depth else 0),
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
        self._advance(group, sequence, row)
        if self.config.prefix_caching and self.config.wait_for_prefix:
            page_size = self.config.page_size
            full = (sequence.committed - 1) // page_size
            self.waiting.prefixes.announce(sequence, sequence.hashes[cached_tokens // page_size : full])
        group.issue(
            Start(
                lease=sequence.lease, tokens=sequence.tokens.tobytes(), prompt_tokens=sequence.prompt_tokens,
                cached_tokens=cached_tokens, blocks=np.array(sequence.blocks.blocks, np.int32).tobytes(),
                params=sequence.params, seed=sequence.seed, choice=sequence.choice, stop_ids=sequence.stop_ids,
                max_tokens=sequence.max_tokens,
            )
        )  # fmt: skip

    # ---- pages: publish, grant, preempt -------------------------------------------------------------------------------

    def _advance(self, group: ResidentGroup, sequence: Sequence, row: int) -> bool:
        """Looks after a row that is due: publishes what it has filled, and says when it is due next.

        That is the length at which it fills a page or runs low, while it decodes. Returns whether it runs low already.
        """
        blocks, page_size = sequence.blocks, self.config.page_size
        assert blocks is not None
        length = int(group.length[row])
        full = (length - int(group.pending[row])) // page_size
        if full > len(blocks.nodes):
            self._publish(group, sequence, blocks, full)
        filled = (full + 1) * page_size + 1
        pages = len(blocks.blocks)
        low = pages * page_size - self.config.grant_ahead + 1
        if pages == sequence.pages_at_most or filled < low:
            group.due[row] = filled
        else:
            group.due[row] = low
        return length >= low and pages < sequence.pages_at_most

    def _publish(self, group: ResidentGroup, sequence: Sequence, blocks: SequenceBlocks, pages: int) -> None:
        """Publishes pages that the committed computation has filled, up to `pages`; a twin published first is adopted."""
        page_size = self.config.page_size
        assert sequence.lease is not None
        group.write_back(sequence, pages * page_size)
        if not self.config.prefix_caching:
            return
        sequence.hash_up_to(pages, page_size)
        for index in range(len(blocks.nodes), pages):
            page = sequence.buffer[index * page_size : (index + 1) * page_size]
            adopted = self.table.publish(blocks, page, sequence.hashes[index])
            if adopted is not None:
                group.issue(Remap(sequence.lease, index, adopted))
            self.waiting.published(sequence, sequence.hashes[index])

    def _extend(self, group: ResidentGroup, needy: list[Sequence]) -> None:
        """Grants pages to the leases that run low and to the starved, oldest first: it takes from nobody just served."""
        if group.starved:
            needy = list({*group.starved, *needy})
            group.starved.clear()
        for sequence in sorted(needy):
            if sequence.state is State.RUNNING:  # neither ended in this report nor the victim of an older one
                self._grant(group, sequence)

    def _grant(self, group: ResidentGroup, sequence: Sequence) -> None:
        """Extends a lease; without a free page a younger sequence gives its pages up, in this same call."""
        assert sequence.blocks is not None
        assert sequence.lease is not None
        wanted = self._pages_for(sequence, int(group.length[sequence.row])) - len(sequence.blocks.blocks)
        while (pages := self.table.grow(sequence.blocks, wanted)) is None:
            victim = policy.choose_victim(sequence, group.running)
            if victim is None:
                group.lease_waits += 1
                group.starved.append(sequence)  # its row stays due: the next report tries again
                return
            self._preempt(group, victim)
        group.issue(Grant(sequence.lease, tuple(pages)))
        self._advance(group, sequence, sequence.row)

    def _preempt(self, group: ResidentGroup, victim: Sequence) -> None:
        assert victim.lease is not None
        group.issue(Drop(victim.lease))
        self.counters.preemptions += 1
        self.counters.recomputed_tokens += group.computed(victim.row)
        victim.preemptions += 1
        group.write_back(victim)
        self._leave(group, victim)
        self.waiting.enter(victim)

    # ---- ends ---------------------------------------------------------------------------------------------------------

    def _finish_early(self, front_end: int, stream: int, reason: FinishReason, keep_tokens: int | None = None) -> None:
        sequence = self.sequences.get((front_end, stream))
        if sequence is None:
            return
        output = sequence.committed - sequence.prompt_tokens
        group = self._group_of(sequence)
        if group is not None and sequence.lease is not None:
            output = group.output_tokens(sequence)
            group.issue(Drop(sequence.lease))
            self._leave(group, sequence)
        self._finish(sequence, reason, output if keep_tokens is None else min(keep_tokens, output))
        if group is not None:
            self._extend(group, [])
        self._admit()

    def _leave(self, group: ResidentGroup, sequence: Sequence, *, release: bool = True) -> None:
        """The lease is over: the row and the pages are given back. Tokens that are still needed have been written back."""
        assert sequence.blocks is not None
        group.unseat(sequence)
        if release:
            self.table.release(sequence.blocks)
        sequence.lease, sequence.row, sequence.blocks = None, -1, None
        self.waiting.withdraw(sequence)

    def _finish(self, sequence: Sequence, reason: FinishReason, output: int, message: str = "") -> None:
        """The one end of a sequence that holds nothing any more. output: its tokens."""
        if sequence.state is not State.RUNNING:
            self.waiting.leave(sequence)
        sequence.state = State.ENDED
        del self.sequences[sequence.front_end, sequence.stream]
        self.counters.finished += 1
        self.outbox.finished(sequence, reason, output, message)

    def _reconsider(self, reason: str) -> None:
        """The groups have changed: ends what fits none that is up or expected; shortens outputs without a limit."""
        self.waiting.unpark()
        largest = self._largest_pool()
        if largest is None:
            return
        for sequence in [s for s in self.sequences.values() if s.pages_at_most > largest]:
            assert sequence.blocks is None, "a running sequence has a group that is large enough"
            output = sequence.committed - sequence.prompt_tokens
            room = largest * self.config.page_size + 1 - sequence.prompt_tokens
            if sequence.params.max_tokens is not None or room < 1:
                message = f"no group can serve the request any more: {reason}"
                self._finish(sequence, FinishReason.FAILED, output, message)
            elif output >= room:
                self._finish(sequence, FinishReason.LENGTH, output)
            else:
                sequence.max_tokens, sequence.pages_at_most = room, largest

    # ---- small things -------------------------------------------------------------------------------------------------

    def _largest_pool(self) -> int | None:
        """Pages of the largest pool; 0 without any group; None while a group of unknown size is expected."""
        if any(blocks == 0 for blocks in self.expected.values()):
            return None
        return max([*self.expected.values(), *(group.blocks for group in self.groups.values())], default=0)

    def _pages_for(self, sequence: Sequence, length: int) -> int:
        """Pages that hold `length` tokens and the slots granted ahead, no more than the sequence can ever need."""
        return min(pages_for(length + self.config.grant_ahead, self.config.page_size), sequence.pages_at_most)

    def _group_of(self, sequence: Sequence) -> ResidentGroup | None:
        return self.groups.get(sequence.blocks.group) if sequence.blocks is not None else None

    def _holder(self, group: ResidentGroup, lease: int) -> Sequence | None:
        """The sequence that still holds `lease`, None if it has ended."""
        sequence = group.sequences[lease & ROW_MASK]
        return sequence if sequence is not None and sequence.lease == lease else None


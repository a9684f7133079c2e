"""The one owner: every block and every sequence of the cluster, and each decision about them.

Plain Python and NumPy; no Ray, no torch, no clock. Every call is synchronous, hence atomic: the shell around it (an actor,
a lock, a simulator) sets `now_s`, calls in, then delivers what `take_logs` and then `outbox.drain` hand out.

    submit ──▶ waiting ──admit: route, pin, reserve──▶ running ──report: commit, publish, grant──▶ ended
                  ▲                                        │
                  └─────────── preempt, group_down ────────┘
"""

import math
from collections.abc import Iterable, Mapping

from kvcache.ids import BlockId, GroupId, host_of, narrow_of
from kvcache.standing import Standing
from scheduler import leases
from scheduler.config.core import CoreConfig, QueueBounds, Resolved
from scheduler.placement.admission import Admission
from scheduler.placement.intake import end_of, take_in
from scheduler.placement.suspects import Suspects
from scheduler.placement.why import Tell
from scheduler.protocol.leaders import Adapts, Commands, End, Moved, Refused, Report
from scheduler.protocol.messages import Failure, FinishReason, Request
from scheduler.state import invariants
from scheduler.state.cluster import ClusterState, Rest
from scheduler.state.resident import ProtocolError, ResidentGroup
from scheduler.state.sequence import Sequence


class SchedulerCore:
    """Sequences, groups and the global block table; see the module's picture.

    Invariants are written out in `scheduler.state.invariants`.
    """

    def __init__(self, config: CoreConfig, resolved: Resolved | None = None, bounds: QueueBounds | None = None) -> None:
        """bounds: None where whoever submits is willing to wait, however long the queue."""
        self.config, self.resolved = config, resolved or Resolved()
        self._state = state = ClusterState(config, self.resolved, bounds)
        self._admission = Admission(state)
        self._suspects = Suspects(state, self._admission)
        self.table, self.groups, self.sequences = state.table, state.groups, state.sequences
        self.expected, self.resting = state.expected, state.resting
        self.waiting, self.counters, self.computed = state.waiting, state.counters, state.computed
        self.prefixes, self.transfers, self.routing = state.prefixes, state.transfers, self._admission.routing
        self.watch = state.watch
        self.outbox = state.outbox  # drained by the shell after each call, after `take_logs`
        self._epochs: dict[GroupId, int] = {}

    @property
    def now_s(self) -> float:
        """When the event that is being handled happened; set by the shell before it calls in."""
        return self._state.now_s

    @now_s.setter
    def now_s(self, now_s: float) -> None:
        self._state.now_s = now_s

    @property
    def epochs(self) -> Mapping[GroupId, int]:
        """Of each group the last that has been seen."""
        return self._epochs

    def check(self) -> None:
        """Everything that must hold between two calls, from scratch. Errors: AssertionError that names the rule, the group and
        the sequence."""
        invariants.check(self._state)
        self.routing.check()

    def explain(self, tell: Tell) -> None:
        """From now on `tell` is called for every sequence that goes to a group, with the reasons. It must not call the core."""
        self.routing.explain = tell

    def take_logs(self) -> list[tuple[GroupId, Commands]]:
        """What has been issued since the last call, by group, in the order in which they were first told something.

        Costs nothing for the groups that were told nothing. A group that went down meanwhile hears nothing more.
        """
        told = self.watch.told
        if not told:
            return []
        logs = [(group.group, log) for group in told if (log := group.drain()) is not None]
        told.clear()
        return logs

    # ---- groups -------------------------------------------------------------------------------------------------------

    def expect(self, group: GroupId, blocks: int = 0) -> None:
        """A group is coming up (or back): requests wait for it. blocks: its blocks, if known; else as many as it had. One whose
        end has not been heard of is up until then."""
        if group in self.groups:
            return
        rest = self.resting.pop(group, None)
        self.expected[group] = blocks or (rest.blocks if rest is not None else self.expected.get(group, 0))
        self._state.pools_changed()

    def group_up(
        self,
        group: GroupId,
        epoch: int,
        blocks: int,
        max_num_seqs: int,
        *,
        host_blocks: int = 0,
        ports: tuple[str, ...] = (),
        standing: Iterable[Standing] = (),
        host_standing: Iterable[Standing] = (),
        life: int | None = None,
        narrow_blocks: int = 0,
        host_narrow_blocks: int = 0,
        narrow_standing: Iterable[tuple[BlockId, BlockId]] = (),
        beats: bool = False,
    ) -> None:
        """A group's workers are ready, with nobody in their batch. A former epoch of it is down from now on.

        host_blocks: in host memory. ports: of its ranks, where others fetch blocks; none: it takes no part in transfers.
        standing: what an earlier scheduler has left in its blocks, as `BlockTable.restore` wants it; host_standing: likewise.
        life: the epoch in which its ranks were started; None: this one. They may have served as other epochs before.
        beats: `lives` will be called for it; else it is whole for as long as it is up.
        narrow_blocks, host_narrow_blocks, narrow_standing: of narrow layers, as `BlockTable.restore_beside` wants it.
        Errors: ProtocolError for an epoch that is not newer than the last one, and for blocks that cannot stand so; the group
        is down then.
        """
        if epoch <= self._epochs.get(group, -1):
            raise ProtocolError(f"group {group} came up with epoch {epoch}, but {self._epochs[group]} was seen: a stale worker")
        if group in self.groups:
            self.group_down(group, "replaced by a newer epoch", returning=True)
        self._epochs[group] = epoch
        if self._state.narrow is not None:
            self._check_narrow(group, blocks, narrow_blocks, host_blocks, host_narrow_blocks)
        self._add_pools({group: (blocks, standing), host_of(group): (host_blocks, host_standing)})
        if self._state.narrow is not None:
            self._add_narrow_pools(group, narrow_blocks, host_narrow_blocks, narrow_standing)
        self.expected.pop(group, None)
        self.resting.pop(group, None)
        self.groups[group] = ResidentGroup(
            group, epoch, blocks, max_num_seqs, self.config.block_size, self.resolved.grant_ahead, self.watch,
            self._state.window, self._state.narrow,
        )  # fmt: skip
        self.groups[group].ports, self.groups[group].host_blocks = ports, host_blocks
        self.groups[group].life = epoch if life is None else life
        if beats:
            self.groups[group].whole_s = self.now_s
        self._regroup()
        self._suspects.came(self.groups[group])
        self._reconsider("the pools of the groups that are up are too small", Failure.IMPOSSIBLE)
        self._admit()

    def _add_pools(self, pools: dict[GroupId, tuple[int, Iterable[Standing]]]) -> None:
        """Those that have any blocks, with what stands there. Errors: ProtocolError, and none is added then."""
        added: list[GroupId] = []
        try:
            for pool, (blocks, standing) in pools.items():
                if blocks:
                    self.table.add_group(pool, blocks)
                    added.append(pool)
                    self.table.restore(pool, standing if self.config.enable_prefix_caching else ())
        except ValueError as error:
            for pool in added:
                self.table.remove_group(pool)
            raise ProtocolError(f"group {min(pools)} says of its pool what cannot be: {error}") from error

    def _check_narrow(
        self, group: GroupId, blocks: int, narrow_blocks: int, host_blocks: int, host_narrow_blocks: int
    ) -> None:  # fmt: skip
        """Whoever fits its other pool fits that of narrow layers, alone. Errors: ProtocolError; also where only one kind of
        layer has host memory."""
        narrow = self._state.narrow
        longest = -(-self.resolved.max_model_len // self.config.block_size)
        if narrow is not None and narrow_blocks < min(narrow.most, longest, blocks):
            raise ProtocolError(f"group {group} has {narrow_blocks} blocks of narrow layers, a sequence may hold {narrow.most}")
        if bool(host_blocks) != bool(host_narrow_blocks):
            raise ProtocolError(f"group {group} has {host_blocks} blocks in host memory, and {host_narrow_blocks} narrow ones")

    def _add_narrow_pools(
        self, group: GroupId, blocks: int, host_blocks: int, standing: Iterable[tuple[BlockId, BlockId]]
    ) -> None:  # fmt: skip
        """Beside those that have been added. Errors: ProtocolError, and none is left then."""
        self.table.add_group(narrow_of(group), blocks)
        if host_blocks:
            self.table.add_group(narrow_of(host_of(group)), host_blocks)
        try:
            self.table.restore_beside(group, standing if self.config.enable_prefix_caching else ())
        except ValueError as error:
            self._remove_pools(group)
            raise ProtocolError(f"group {group} says of its narrow layers' pool what cannot be: {error}") from error

    def _remove_pools(self, group: GroupId) -> None:
        """All that it has."""
        for pool in (group, host_of(group)):
            for each in (pool, narrow_of(pool)):
                if each in self.table.pools:
                    self.table.remove_group(each)

    def group_down(
        self, group: GroupId, reason: str, *, returning: bool = False, back_s: float | None = None
    ) -> None:  # fmt: skip
        """A group is lost with its KV. Its sequences wait again, from their committed tokens on.

        returning: a replacement is on its way. Otherwise it is tried again in `back_s`, and whoever has been taken in waits for
        it; None: it is not, and sequences that fit no other group fail with `reason`. Also called for a group that was only
        expected and will not come, or not yet.
        """
        lost, rest = self.groups.pop(group, None), self.resting.pop(group, None)
        expected = self.expected.pop(group, rest.blocks if rest is not None else 0)
        blocks = expected if lost is None else lost.blocks
        if returning:
            self.expected[group] = blocks
        else:
            self._state.lost = reason
            if back_s is not None:
                self.resting[group] = Rest(blocks, self.now_s + back_s)
        self._regroup()
        if lost is not None:
            self.transfers.group_down(lost)
            for sequence in [*sorted(lost.fetching), *sorted(lost.running)]:
                self._bereave(lost, sequence, reason)
            self._remove_pools(group)
            self.watch.forget(lost)
        self._reconsider(reason, Failure.UNAVAILABLE)
        self._admit()

    def _bereave(self, lost: ResidentGroup, sequence: Sequence, reason: str) -> None:
        """It ran in a group that has died, or was about to."""
        state, poison = self._state, None
        if sequence.lease is not None:
            lost.write_back(sequence)
            poison = self._suspects.note(lost, sequence)
        leases.leave(state, lost, sequence, lost=True)
        if poison is None:
            self.waiting.enter(sequence, self.now_s)
        else:
            output = state.output_of(sequence)
            leases.finish(state, sequence, FinishReason.FAILED, output, f"{poison}, so it is not tried again: {reason}")

    def lives(self, group_id: GroupId, epoch: int, whole_s: float) -> None:
        """At that time every rank of the group lived, and no step that still goes on had begun."""
        group = self.groups.get(group_id)
        if group is None or group.epoch != epoch:
            return
        group.whole_s = max(group.whole_s, whole_s)
        if self.waiting.apart or self._suspects.group is not None:
            self._admit()

    def _admit(self) -> None:
        if self.waiting.apart or self._suspects.group is not None:
            self._suspects.try_next()
        self._admission.admit()

    def _regroup(self) -> None:
        self.routing.regroup()
        self._state.pools_changed()

    def drain(self, group: GroupId, *, returning: bool = False) -> bool:
        """The group takes no more sequences, so that it can be removed once nobody runs there.

        False, and nothing has changed, if it is not up; also if it is the last one that takes any, or the only one large enough
        for some sequence, unless it is returning, so that requests may wait for it.
        """
        rest = [other.blocks for name, other in self.groups.items() if name != group and not other.draining]
        needed = max((sequence.blocks_at_once for sequence in self.sequences.values()), default=0)
        if group not in self.groups or (not returning and (not rest or max(rest) < needed)):
            return False
        self.groups[group].set_draining(True)
        return True

    def vacate(self, group: GroupId) -> None:
        """Those that still run in a draining group go on elsewhere: with their blocks where these can be sent, otherwise from
        their committed tokens on. Call it again until nobody runs there any more."""
        leaving = self.groups[group]
        for sequence in sorted(leaving.running, reverse=True):
            if not self._admission.move(leaving, sequence):
                leases.preempt(self._state, leaving, sequence)
        self._admit()

    def migrate(self, front_end: int, stream: int) -> bool:
        """Lets a running sequence go on in the least loaded other group that has room; False if it cannot, or does not run."""
        sequence = self.sequences.get((front_end, stream))
        group = self._state.group_of(sequence) if sequence is not None else None
        if sequence is None or group is None or sequence.lease is None:
            return False
        began = self._admission.move(group, sequence)
        self._admit()
        return began

    # ---- front ends ---------------------------------------------------------------------------------------------------

    def submit(self, front_end: int, request: Request) -> None:
        """Takes a request in; it starts at once if there is room. What is resumed may have nothing left to compute.

        Errors: RequestRefused if it can never fit or the queue is full, ProtocolError if a stream of it is in use; nothing has
        changed then.
        """
        sequences = take_in(self._state, front_end, request)
        if request.resumption is not None or request.had:
            sequences = [sequence for sequence in sequences if not self._ends(sequence)]
        if sequences and (self._admission.welcome(sequences) or self._suspects.group is not None):
            self._admit()

    def _ends(self, sequence: Sequence) -> bool:
        """Ends it at once if nothing of it is left to compute."""
        if (reason := end_of(sequence)) is None:
            return False
        self.waiting.enter(sequence, self.now_s)
        leases.end(self._state, sequence, reason)
        return True

    def abort(self, front_end: int, stream: int) -> None:
        """The client went away: its blocks are free at once. A stream that has ended already is left alone."""
        self._end(front_end, stream, FinishReason.ABORTED)

    def end(self, front_end: int, stream: int, keep_tokens: int) -> None:
        """The front end found a stop string after `keep_tokens` output tokens. The first end to be committed wins."""
        self._end(front_end, stream, FinishReason.STOP, keep_tokens)

    def front_end_down(self, front_end: int) -> None:
        """A front end is gone: all its requests are aborted, the youngest first, so that none starts only to be aborted."""
        for owner, stream in [key for key in reversed(self.sequences) if key[0] == front_end]:
            self.abort(owner, stream)
        self.outbox.forget(front_end)

    def shut_down(self, reason: str) -> None:
        """The cluster ends for good: so does every request, the youngest first, and every group's log. Front ends are told, or
        they would wait for another scheduler."""
        for sequence in [*reversed(self.sequences.values())]:
            leases.end(self._state, sequence, FinishReason.FAILED, reason, Failure.UNAVAILABLE)
        for group in self.groups.values():
            group.issue(End(reason))

    # ---- reports ------------------------------------------------------------------------------------------------------

    def report(self, group_id: GroupId, report: Report) -> None:
        """Commits what a group's steps did: tokens, published blocks, ends; then grants, and admits who fits now.

        A report of a stale epoch is discarded whole, tokens of ended leases one by one: the cut is what this call commits.
        Errors: ProtocolError for a gap in the stream.
        """
        group = self.groups.get(group_id)
        if group is None or report.epoch != group.epoch:
            return
        if report.number != group.reports:
            raise ProtocolError(f"group {group_id} sent report {report.number}, expected {group.reports}: fence it")
        if not 1 <= report.steps <= self.config.block_size:  # the ring holds a block and one report
            at_most = self.config.block_size
            raise ProtocolError(f"group {group_id} sent a report of {report.steps} steps, not 1 to {at_most}: fence it")
        if report.expert_load is not None and not report.expert_load.whole:
            raise ProtocolError(f"group {group_id} tells of its experts what cannot be: fence it")
        due, sampled, computed, audience, told, advanced = group.commit(report)
        self.counters.output_tokens += sampled
        if report.computed:
            self.transfers.measured("compute", computed, report.elapsed_s)
        self.computed.count(computed, self._state.now_s)
        self.outbox.tokens(audience, told, advanced)
        cleared = self._suspects.clear(group) if group.alone is not None else False
        for lease, payload in report.logprobs:
            if (sequence := group.holder(lease)) is not None:
                self.outbox.logprobs(sequence, payload)
        if not (due or report.finished or cleared):
            return  # nothing that could let anyone publish, grow or start
        leases.advance(self._state, group, due, report.finished)
        self._admit()

    def moved(self, group_id: GroupId, moved: Moved) -> None:
        """A group has done its part of a transfer, or could not. Who waited for the blocks starts."""
        group = self.groups.get(group_id)
        if group is None or moved.epoch != group.epoch:
            return
        self._admission.moved(group, moved)
        self._admit()

    def refuse(self, group_id: GroupId, refused: Refused) -> None:
        """A group cannot serve these leases: their adapter could not be read there."""
        group = self.groups.get(group_id)
        if group is None or refused.epoch != group.epoch:
            return
        for lease in refused.leases:
            if (sequence := group.holder(lease)) is not None:
                leases.end(self._state, sequence, FinishReason.FAILED, refused.message)
        self._admit()

    def adapts(self, group_id: GroupId, adapts: Adapts) -> None:
        """A group has the adapter of these leases by now: who has not begun before has been queued until then."""
        group = self.groups.get(group_id)
        if group is None or adapts.epoch != group.epoch:
            return
        for lease in adapts.leases:
            sequence = group.holder(lease)
            if sequence is not None and not sequence.preemptions and not self._state.output_of(sequence):
                sequence.started_s = self.now_s
                self.outbox.started(sequence)

    # ---- ends ---------------------------------------------------------------------------------------------------------

    def _end(self, front_end: int, stream: int, reason: FinishReason, keep_tokens: int | None = None) -> None:
        sequence = self.sequences.get((front_end, stream))
        if sequence is not None:
            leases.end(self._state, sequence, reason, keep_tokens=keep_tokens)
            self._admit()

    def _reconsider(self, reason: str, failure: Failure) -> None:
        """The groups have changed: shortens outputs without a limit to what is up or expected; ends what will fit none, also
        once those that rest have come back."""
        self.waiting.unpark()
        state = self._state
        largest = state.largest if state.largest != 0 else state.largest_later
        if largest is None:
            return
        for sequence in [s for s in self.sequences.values() if s.blocks_at_once > largest]:
            assert sequence.blocks is None, "a running sequence has a group that is large enough"
            output = sequence.committed - sequence.prompt_tokens
            room = largest * self.config.block_size + 1 - sequence.prompt_tokens
            if sequence.params.max_tokens is not None or sequence.pooling is not None or room < 1:
                if state.rests_s(sequence.blocks_at_once) < math.inf:
                    continue
                message = f"no group can serve the request now: {reason}"
                leases.end(state, sequence, FinishReason.FAILED, message, failure)
            elif output >= room:
                leases.end(state, sequence, FinishReason.LENGTH)
            else:
                sequence.max_tokens, sequence.blocks_at_most, sequence.blocks_at_once = room, largest, largest

"""A running sequence is placed anew: another group takes it with its blocks, and the rest of its life.

    begin    what it has published goes ahead, while it decodes on
    follow   that has arrived: it stops; the blocks that it has filled since, and the last one, are fetched; it starts there

After Llumnix (arXiv 2406.03243), whose last stage is the stop here too. Done where a group is left, and where one is about to
run out of blocks: before somebody has to give way there, that one

    moves        as above
    is kept      its blocks are copied to host memory while it decodes on; when it has given way, they come back from there
    recomputes   nothing: it gives way when no block is left, and computes what has been evicted until it starts again

whichever is the cheapest, by the measured rates. Imports `state`, `admission`, `leases`, `policy` and the table.
"""

import math
from dataclasses import dataclass

from kvcache.ids import GroupId, host_of
from scheduler import policy
from scheduler.placement.admission import Admission
from scheduler.protocol.messages import LeaseId
from scheduler.running import leases
from scheduler.running.resident import ResidentGroup
from scheduler.sequence import Sequence
from scheduler.state import ClusterState

RETRY_S = 1.0
"""Before a group for which nothing could be done is looked at again."""


@dataclass(slots=True)
class Plan:
    """For the sequence that would give way next, as long as it has this lease.

    blocks: of it, that have been copied to host memory or are on their way there. again_s: when to choose anew.
    """

    sequence: Sequence
    lease: LeaseId | None
    way: policy.Remedy
    blocks: int
    again_s: float


class Migration:
    """Works on the shared state; its own is one plan for each group that is short of blocks."""

    def __init__(self, state: ClusterState, admission: Admission) -> None:
        self._state = state
        self._admission = admission
        self._plans: dict[GroupId, Plan] = {}

    # ---- it moves

    def begin(self, group: ResidentGroup, sequence: Sequence, target: GroupId | None = None) -> bool:
        """Lets a running sequence move to `target`, else to the least loaded group that has room for it. False if there is
        none: nothing has changed then. True also if it is on its way already."""
        table, transfers, blocks, lease = self._state.table, self._state.transfers, sequence.blocks, sequence.lease
        assert blocks is not None
        assert lease is not None
        if transfers.moving(sequence):
            return True
        target = self._target(group, sequence) if target is None else target
        if target is None:
            return False
        match = table.chain(blocks)
        depth, published = match.depth(target), len(match.nodes)
        if depth == published:
            self.follow(sequence, lease, target)
            return True
        held = table.hold(group.group, match, published, blocks.salt)
        ahead = table.reserve(target, match, depth, published - depth, blocks.salt)
        assert ahead is not None, "the target was chosen for its room"
        transfers.begin(sequence, held, ahead, moves=lease)
        return True

    def follow(self, sequence: Sequence, lease: LeaseId, target: GroupId) -> None:
        """What went ahead has arrived. The sequence stops where it runs and starts in `target`; if that has no room any more,
        it waits for its turn like others."""
        state = self._state
        group = state.group_of(sequence)
        if sequence.lease != lease or group is None or target not in state.groups:
            return  # it has ended, or was restarted, meanwhile
        state.counters.migrations += 1
        leases.interrupt(state, group, sequence)
        leases.extend(state, group, [])  # others there may have waited for its blocks
        self._admission.place_in(state.groups[target], sequence)

    def _target(self, group: ResidentGroup, sequence: Sequence, *, calm: bool = False) -> GroupId | None:
        """The least loaded group that has room for it. calm: so much that it will not be short of blocks itself soon."""
        assert sequence.blocks is not None
        wanted = len(sequence.blocks.blocks)
        able = [
            (other.coming + len(other.running), other.group)
            for other in self._state.groups.values()
            if other is not group and not (other.draining or other.starved) and len(other.ports) == len(group.ports) > 0
            and other.blocks >= sequence.blocks_at_most and other.rows_left > 0
            and self._state.table.available(other.group) > wanted + (2 * other.shortage if calm else 0)
        ]  # fmt: skip
        return min(able)[1] if able else None

    # ---- before it has to give way

    def relieve(self, group: ResidentGroup) -> None:
        """Called when blocks have been granted. Costs a comparison while there are enough."""
        if self._state.table.available(group.group) >= group.shortage or not self._state.config.relieve:
            return
        plan = self._plans.get(group.group)
        if plan is None or plan.sequence.lease != plan.lease or plan.again_s <= self._state.now_s:
            plan = self._plan(group)
        if plan is not None and plan.way is policy.Remedy.KEEP:
            self._keep(group, plan)

    def group_down(self, group: GroupId) -> None:
        self._plans.pop(group, None)

    def _plan(self, group: ResidentGroup) -> Plan | None:
        """Chooses who would give way to the first, as if no block were left, and does what is the cheapest for it."""
        state = self._state
        victim = leases.find_victim(state.table, group, min(group.running)) if len(group.running) > 1 else None
        if victim is None or victim.blocks is None:
            return None
        lease = victim.lease  # a move may end it at once
        lost = leases.cost_of(state.table, group, victim).lost_tokens
        blocks, block_size, rates = len(victim.blocks.nodes), state.block_size, state.rates
        target = self._target(group, victim, calm=True)
        move = policy.fetch_work(rates.fetch_cost, block_size, blocks + group.sending) if target is not None else None
        has_room = group.host_blocks > 0 and state.table.available(host_of(group.group)) >= blocks
        keep = 2 * policy.fetch_work(rates.load_cost, block_size, blocks) if has_room else None
        way = policy.relief(lost, move, keep)
        if way is policy.Remedy.MOVE and target is not None:
            self.begin(group, victim, target)
            state.counters.moved_for_room += 1
        again_s = state.now_s + RETRY_S if way is policy.Remedy.RECOMPUTE else math.inf
        plan = self._plans[group.group] = Plan(victim, lease, way, 0, again_s)
        return plan

    def _keep(self, group: ResidentGroup, plan: Plan) -> None:
        """Copies what it has published since the last time."""
        blocks = plan.sequence.blocks
        if blocks is not None and len(blocks.nodes) > plan.blocks and self._state.transfers.keep(group, plan.sequence):
            self._state.counters.kept_for_room += plan.blocks == 0
            plan.blocks = len(blocks.nodes)

"""A group that is about to run out of blocks: before somebody has to give way, that one leaves, or what it has is kept.

    move       it goes on in another group, with its blocks, which are copied while it decodes on (`migration`)
    keep       its blocks are copied to host memory while it decodes on; when it has given way, they come back from there
    recompute  nothing: it gives way when no block is left, and computes what has been evicted until it starts again

Whichever is the cheapest, by the measured rates. Imports `state`, `victims`, `policy`, `migration` and `host_tier`.
"""

from dataclasses import dataclass

from kvcache.ids import GroupId, host_of
from scheduler import policy
from scheduler.protocol.messages import LeaseId
from scheduler.running.host_tier import HostTier
from scheduler.running.migration import Migration
from scheduler.running.resident import ResidentGroup
from scheduler.running.victims import cost_of, find_victim
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


class Relief:
    """Works on the shared state; has one plan for each group that is short of blocks."""

    def __init__(self, state: ClusterState, migration: Migration, host_tier: HostTier) -> None:
        self._state = state
        self._migration = migration
        self._host_tier = host_tier
        self._plans: dict[GroupId, Plan] = {}

    def look_after(self, group: ResidentGroup) -> None:
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
        victim = find_victim(state.table, group, min(group.running)) if len(group.running) > 1 else None
        if victim is None or victim.blocks is None:
            return None
        lease = victim.lease  # a move may end it at once
        lost = cost_of(state.table, group, victim).lost_tokens
        blocks, block_size, rates = len(victim.blocks.nodes), state.config.block_size, state.rates
        target = self._migration.target(group, victim, calm=True)
        move = policy.fetch_work(rates.fetch_cost, block_size, blocks + group.sending) if target is not None else None
        has_room = group.host_blocks > 0 and state.table.available(host_of(group.group)) >= blocks
        keep = 2 * policy.fetch_work(rates.load_cost, block_size, blocks) if has_room else None
        way = policy.relief(lost, move, keep)
        if way is policy.Remedy.MOVE and target is not None:
            self._migration.begin(group, victim, target)
            state.counters.moved_for_room += 1
        again_s = state.now_s + RETRY_S if way is policy.Remedy.RECOMPUTE else float("inf")
        plan = self._plans[group.group] = Plan(victim, lease, way, 0, again_s)
        return plan

    def _keep(self, group: ResidentGroup, plan: Plan) -> None:
        """Copies what it has published since the last time."""
        blocks = plan.sequence.blocks
        if blocks is not None and len(blocks.nodes) > plan.blocks and self._host_tier.keep(group, plan.sequence):
            self._state.counters.kept_for_room += plan.blocks == 0
            plan.blocks = len(blocks.nodes)

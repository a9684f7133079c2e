"""A running sequence is placed anew: another group takes it with its blocks, and the rest of its life.

    begin    what it has published goes ahead, while it decodes on
    follow   that has arrived: it stops; the blocks that it has filled since, and the last one, are fetched; it starts there

After Llumnix (arXiv 2406.03243), whose last stage is the stop here too. Done where a group is left, and where it is asked for
(`SchedulerCore.migrate`). Imports `state`, `admission`, `leases` and the table.
"""

from kvcache.ids import GroupId
from scheduler.placement.admission import Admission
from scheduler.protocol.messages import LeaseId
from scheduler.running import leases
from scheduler.running.resident import ResidentGroup
from scheduler.sequence import Sequence
from scheduler.state import ClusterState


class Migration:
    """Works on the shared state; has none of its own."""

    def __init__(self, state: ClusterState, admission: Admission) -> None:
        self._state = state
        self._admission = admission

    def begin(self, group: ResidentGroup, sequence: Sequence) -> bool:
        """Lets a running sequence move to the least loaded group that has room for it. False if there is none: nothing has
        changed then. True also if it is on its way already."""
        table, transfers, blocks, lease = self._state.table, self._state.transfers, sequence.blocks, sequence.lease
        assert blocks is not None
        assert lease is not None
        if transfers.moving(sequence):
            return True
        target = self._target(group, sequence)
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

    def _target(self, group: ResidentGroup, sequence: Sequence) -> GroupId | None:
        """The least loaded group that has room for it."""
        assert sequence.blocks is not None
        wanted = len(sequence.blocks.blocks)
        able = [
            (other.coming + len(other.running), other.group)
            for other in self._state.groups.values()
            if other is not group and not (other.closed or other.starved) and len(other.ports) == len(group.ports) > 0
            and other.blocks >= sequence.blocks_at_most and other.rows_left > 0
            and self._state.table.available(other.group) > wanted
        ]  # fmt: skip
        return min(able)[1] if able else None

"""Live migration: a running sequence goes to another group with its blocks.

    begin    what it has published goes ahead, while it decodes on
    follow   that has arrived: it stops; the blocks that it has filled since, and the last one, are fetched; it starts there

After Llumnix (arXiv 2406.03243), whose last stage is the stop here too. Imports `state`, `admission`, `paging`, `transfers`.
"""

from kvcache.ids import GroupId
from scheduler.placement.admission import Admission
from scheduler.protocol.messages import LeaseId
from scheduler.running.paging import Paging
from scheduler.running.resident import ResidentGroup
from scheduler.running.transfers import Transfers
from scheduler.sequence import Sequence
from scheduler.state import ClusterState


class Migration:
    """Works on the shared state; has none of its own."""

    def __init__(self, state: ClusterState, transfers: Transfers, paging: Paging, admission: Admission) -> None:
        self._state = state
        self._transfers = transfers
        self._paging = paging
        self._admission = admission

    def begin(self, group: ResidentGroup, sequence: Sequence, target: GroupId | None = None) -> bool:
        """Lets a running sequence move to `target`, else to the least loaded group that has room for it. False if there is
        none: nothing has changed then. True also if it is on its way already."""
        table, blocks, lease = self._state.table, sequence.blocks, sequence.lease
        assert blocks is not None
        assert lease is not None
        if self._transfers.moving(sequence):
            return True
        target = self.target(group, sequence) if target is None else target
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
        self._transfers.begin(sequence, held, ahead, moves=lease)
        return True

    def follow(self, sequence: Sequence, lease: LeaseId, target: GroupId) -> None:
        """What went ahead has arrived. The sequence stops where it runs and starts in `target`; if that has no room any more,
        it waits for its turn like others."""
        group = self._state.group_of(sequence)
        if sequence.lease != lease or group is None or target not in self._state.groups:
            return  # it has ended, or was restarted, meanwhile
        self._state.counters.migrations += 1
        self._paging.interrupt(group, sequence)
        self._paging.extend(group, [])  # others there may have waited for its blocks
        self._admission.place_in(self._state.groups[target], sequence)

    def target(self, group: ResidentGroup, sequence: Sequence, *, calm: bool = False) -> GroupId | None:
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

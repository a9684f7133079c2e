"""A second, larger cache for each group, in its host's memory: what a sequence has published is copied there when it leaves.

So eviction loses nothing and takes no time; `admission` brings blocks back when that is cheaper than to compute them. The tier
holds what the device holds and more (inclusive, as SGLang's HiCache is), which keeps prefixes whole there: it is a pool of the
table like others, with its own order of eviction. Imports `state`, `transfers` and the table.
"""

from kvcache.ids import host_of
from kvcache.match import Match
from scheduler.running.resident import ResidentGroup
from scheduler.running.transfers import Transfers
from scheduler.sequence import Sequence
from scheduler.state import ClusterState

OFFLOADING_SHARE = 4
"""Of a pool, one part in so many may be on its way to host memory: what is pinned for that is no room for others."""


class HostTier:
    """Works on the shared state; has none of its own."""

    def __init__(self, state: ClusterState, transfers: Transfers) -> None:
        self._state = state
        self._transfers = transfers

    def offload(self, group: ResidentGroup, sequence: Sequence) -> None:
        """The sequence is about to give its blocks back: what the tier has not is copied, off the stream of the steps.

        Not all of it where the tier is busy, and nothing where room is short, as after a preemption.
        """
        table, blocks = self._state.table, sequence.blocks
        if not group.host_blocks or blocks is None:
            return
        match = table.chain(blocks)
        depth = match.depth(host_of(group.group))
        new = min(len(match.nodes) - depth, group.blocks // OFFLOADING_SHARE - group.sending)
        if 0 < new <= table.available(group.group):
            self._begin(group, sequence, match, depth, new)

    def keep(self, group: ResidentGroup, sequence: Sequence) -> bool:
        """The same for one that runs on: it holds its blocks anyway. Whether all are there, or on their way."""
        assert sequence.blocks is not None
        match = self._state.table.chain(sequence.blocks)
        depth = match.depth(host_of(group.group))
        new = len(match.nodes) - depth
        return new == 0 or self._begin(group, sequence, match, depth, new)

    def _begin(self, group: ResidentGroup, sequence: Sequence, match: Match, depth: int, new: int) -> bool:
        """False, and nothing has changed, if host memory is full of what is on its way."""
        table, salt = self._state.table, sequence.salt
        held = table.hold(group.group, match, depth + new, salt)
        stored = table.reserve(host_of(group.group), match, depth, new, salt)
        if stored is None:
            table.release(held)
            return False
        self._transfers.begin(sequence, held, stored)
        return True

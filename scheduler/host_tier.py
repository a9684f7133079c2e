"""A second, larger cache for each group, in its host's memory: what a sequence has published is copied there when it leaves.

So eviction loses nothing and takes no time; `admission` brings pages back when that is cheaper than to compute them. The tier
holds what the device holds and more (inclusive, as SGLang's HiCache is), which keeps prefixes whole there: it is a pool of the
table like others, with its own order of eviction. Imports `state`, `transfers` and the table.
"""

from kvcache.ids import host_of
from scheduler.resident import ResidentGroup
from scheduler.sequence import Sequence
from scheduler.state import ClusterState
from scheduler.transfers import Transfers

OFFLOADING_SHARE = 4
"""Of a pool, one part in so many may be on its way to host memory: what is pinned for that is no room for others."""


class HostTier:
    """Works on the shared state; has none of its own."""

    def __init__(self, state: ClusterState, transfers: Transfers) -> None:
        self._state = state
        self._transfers = transfers

    def offload(self, group: ResidentGroup, sequence: Sequence) -> None:
        """The sequence is about to give its pages back: what the tier has not is copied, off the stream of the steps.

        Not all of it where the tier is busy, and nothing where room is short, as after a preemption.
        """
        table, blocks = self._state.table, sequence.blocks
        if not group.slots or blocks is None:
            return
        host, match = host_of(group.group), table.chain(blocks)
        depth = match.depth(host)
        new = min(len(match.nodes) - depth, group.blocks // OFFLOADING_SHARE - group.sending)
        if new < 1 or table.available(group.group) < new:
            return
        held = table.hold(group.group, match, depth + new, blocks.salt)
        stored = table.reserve(host, match, depth, new, blocks.salt)
        if stored is None:
            table.release(held)
        else:
            self._transfers.begin(sequence, held, stored)

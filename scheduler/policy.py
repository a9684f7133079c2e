"""Where a sequence goes, whether it may start, and who makes room. Pure functions over snapshots; no state, no clock.

Imports nothing of Manta. To try another policy, replace a function here; the core asks nothing else.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
T = TypeVar("T")

UNCACHED_WEIGHT = 4.0
"""How much more a prompt token to compute counts than one that is queued already. The queue delays this sequence alone, once;
a prefix computed a second time delays all that come behind it and evicts another. In replays of a conversation trace the hit
rate is 83% of a single pool's with 1, 96% with 4 and 98% with 8, while 8 waits longer where load is low.
Where prefixes are fetched it hardly matters. See docs/replay.md."""

DECODE_WEIGHT = 16.0
"""Prefill tokens whose work one running sequence stands for while a newcomer waits for its first token."""

FETCH_WEIGHT = 1.0
"""How much a fetch counts beside the wait for it: it takes bandwidth from others, and room for a second copy."""

EVICTION_WEIGHT = 0.25 * UNCACHED_WEIGHT
"""How much a token of a cached block that would be lost counts: a quarter of such blocks is asked for again (in replays 5 to
38%, the more the smaller the pools), and then each of its tokens is one to compute. So a fetch pays for what its copies crowd
out, while a hit where it lies evicts nothing."""

WATERMARK = 0.01
"""Share of a pool that admission leaves to the growth of the sequences that run there."""


class GroupLoad(NamedTuple):
    """One group that could take one sequence, at this moment.

    The same group is looked at twice where another one has more of the prefix: as it is, and with the fetch.
    """

    hit_tokens: int  # of its prefix, that the group holds, or will once they are fetched
    new_blocks: int  # blocks that it needs from free or cached ones, revived hits included
    free: int  # blocks that hold nothing
    available: int  # free or cached
    total: int
    free_rows: int
    running: int  # those whose prefix is on its way there included, here and below
    backlog: int  # prefill tokens granted but not yet computed
    starving: bool  # a running sequence there waits for a block, or there are none for the narrow layers of this one
    fetch_work: float = 0.0  # what the fetch takes, in prefill tokens; those queued before are computed meanwhile
    revived: int = 0  # of the new blocks, those of its hit that nobody holds: they are taken from the cached ones, and stay

    @property
    def evicted(self) -> int:
        """Cached blocks that would be lost."""
        return max(0, self.new_blocks - self.revived - self.free)


class CostTerms(NamedTuple):
    """What a sequence costs in a group, in prefill tokens: the work before its first token, and what it does to others.

    uncached: of its prompt, to be computed. queued: prefill before it. fetch: beyond the queue's time. decoding: those who run.
    evicted: cached blocks that would be lost, for a fetch those included that make room for the copies.
    """

    uncached: float
    queued: float
    fetch: float
    decoding: float
    evicted: float


def room(available: int, total: int, running: int) -> int:
    """Blocks that a newcomer may take: head room is left for those who run.

    An empty group needs no head room, so a sequence that fits a pool alone always starts in the end.
    """
    return available - (max(1, int(total * WATERMARK)) if running else 0)


def admissible(load: GroupLoad) -> bool:
    """Whether the sequence may start there now: a row, its blocks, and room."""
    return load.free_rows > 0 and not load.starving and load.new_blocks <= room(load.available, load.total, load.running)


def terms(load: GroupLoad, tokens: int, block_size: int) -> CostTerms:
    """The parts of `time_to_first_token`."""
    return CostTerms(
        uncached=UNCACHED_WEIGHT * (tokens - load.hit_tokens),
        queued=float(load.backlog),
        fetch=max(0.0, load.fetch_work - load.backlog) + FETCH_WEIGHT * load.fetch_work,
        decoding=DECODE_WEIGHT * load.running,
        evicted=EVICTION_WEIGHT * block_size * load.evicted,
    )


def time_to_first_token(load: GroupLoad, tokens: int, block_size: int) -> float:
    """Estimated work before the first token, and what it costs those who follow, in prefill-token equivalents.

    Uncached prompt, prefill queued before it, decode load, and cached blocks that would be lost. Taking the longest prefix
    first and the load second collapses on real traces, where all requests share a first block: costs must be added up.
    """
    evicted = load.new_blocks - load.revived - load.free
    cost = UNCACHED_WEIGHT * (tokens - load.hit_tokens) + load.backlog + DECODE_WEIGHT * load.running
    if load.fetch_work:
        cost += max(0.0, load.fetch_work - load.backlog) + FETCH_WEIGHT * load.fetch_work
    return cost + EVICTION_WEIGHT * block_size * evicted if evicted > 0 else cost


def least_costs(
    uncached: Ints | int, backlog: Ints, running: Ints, evicted: Ints, block_size: int, fetch_work: Floats | float = 0.0
) -> Floats:
    """[groups] `time_to_first_token` of each.

    uncached: tokens. evicted: blocks, below 0 where so many more are free. The rest is as in `GroupLoad`. Sums are exact in any
    order as long as the weights are whole numbers of quarters.
    """
    wait = np.maximum(backlog, fetch_work) + FETCH_WEIGHT * fetch_work
    return UNCACHED_WEIGHT * uncached + wait + DECODE_WEIGHT * running + EVICTION_WEIGHT * block_size * np.maximum(0, evicted)


def worth_waiting(ahead: int, saved: int, queued: int) -> bool:
    """Whether a sequence waits for what another one is about to compute, rather than compute it a second time where less is
    queued. ahead: tokens that are computed until then. saved: those that it need not compute itself. queued: prefill before it
    where it would start now. As in `time_to_first_token`.
    """
    return ahead <= queued + UNCACHED_WEIGHT * saved


def fetch_work(cost: float, block_size: int, blocks: Any) -> Any:
    """What moving so many blocks takes, in whole prefill tokens: a number for a number, an array for an array.

    cost: of a token, in times to compute one.
    """
    return cost * block_size * blocks // 1


Bound = tuple[float, int, int]
"""A group before a closer look: what a sequence costs there at least, its available blocks below 0, its index."""


def cheapest_first(least: Floats, fits: Bools, available: Ints) -> Iterator[Bound]:
    """The groups that may be admissible, those first that may be the cheapest, as far as somebody asks.

    least: [groups] what each costs at least; it is used up. fits: [groups] whether it may be admissible.
    """
    least[~fits] = np.inf
    while len(least) and (lowest := float(least.min())) < np.inf:
        ties = np.flatnonzero(least == lowest)
        at = int(ties[available[ties].argmax()])
        least[at] = np.inf
        yield lowest, -int(available[at]), at


def route(
    bounds: Iterable[Bound], look: Callable[[int], Iterable[tuple[GroupLoad, T]]], tokens: int, block_size: int
) -> tuple[int, T] | None:
    """The cheapest admissible way: (index of its group, what `look` shows there with its load). None: wait.

    Ties go to the group with more available blocks, then to the first, there to the first way. bounds: in ascending order.
    look: a closer look at one group, as it is and with a fetch; it is taken at few: only at those that cost less, at least,
    than the cheapest seen so far.
    """
    best: tuple[float, int, int, int] | None = None
    choice: tuple[int, T] | None = None
    for bound in bounds:
        if best is not None and best < bound:
            break
        at = bound[2]
        for number, (load, way) in enumerate(look(at)):
            if admissible(load):
                cost = time_to_first_token(load, tokens, block_size), -load.available, at, number
                if best is None or cost < best:
                    best, choice = cost, (at, way)
    return choice


class VictimCost(NamedTuple):
    """A running sequence that could give its blocks up."""

    lost_tokens: int  # KV that nobody else has, to be computed again
    freed_blocks: int  # that nobody else holds
    output_tokens: int  # sampled so far
    place: int  # in the order of service: by priority, then by arrival


def choose_victim(candidates: Iterable[VictimCost], block_size: int) -> int | None:
    """Index of the one whose blocks are cheapest to rebuild, None if there is no candidate.

    By tokens to compute again for each block freed, in eighths of a block: less is how full the last block happens to be. Then
    by progress, in blocks of output; then the less urgent; then the younger. Where all share every block with each other nobody
    frees any at first; then it is the last in the order of service, and the next call finds more.
    """
    costs = (
        (not each.freed_blocks, *_rebuilding(each, block_size), -each.place, index) for index, each in enumerate(candidates)
    )
    best = min(costs, default=None)
    return None if best is None else best[-1]


def _rebuilding(victim: VictimCost, block_size: int) -> tuple[int, int]:
    if not victim.freed_blocks:
        return 0, 0
    return 8 * victim.lost_tokens // (victim.freed_blocks * block_size), victim.output_tokens // block_size

"""Where a sequence goes, whether it may start, and who makes room. Pure functions over snapshots; no state, no clock.

Imports `Sequence`. To try another policy, replace a function here; the core asks nothing else.
"""

from collections.abc import Iterable
from typing import NamedTuple

from scheduler.sequence import Sequence

UNCACHED_WEIGHT = 4.0
"""How much more a prompt token to compute counts than one that is queued already. The queue delays this sequence alone, once;
a prefix computed a second time delays all that come behind it and evicts another. In replays of a conversation trace the hit
rate is 83% of a single pool's with 1, 96% with 4 and 98% with 8, while 8 waits longer where load is low: docs/replay.md."""

DECODE_WEIGHT = 16.0
"""Prefill tokens whose work one running sequence stands for while a newcomer waits for its first token."""

FETCH_WEIGHT = 1.0
"""How much a fetch counts beside the wait for it: it takes bandwidth from others, and room for a second copy."""

EVICTION_WEIGHT = 0.25
"""Share of an evicted page's tokens that is expected to be asked for again, hence computed again."""

WATERMARK = 0.01
"""Share of a pool that admission leaves to the growth of the sequences that run there."""


class GroupLoad(NamedTuple):
    """One group that could take one sequence, at this moment. Plain numbers: a cluster has few groups, so arrays cost more.

    The same group stands in the list twice where another one has more of the prefix: as it is, and with the fetch.
    """

    hit_tokens: int  # of its prefix, that the group holds, or will once they are fetched
    new_pages: int  # pages that it needs from free or cached ones, revived hits included
    free: int  # pages that hold nothing
    available: int  # free or cached
    total: int
    free_rows: int
    running: int
    backlog: int  # prefill tokens granted but not yet computed
    starving: bool  # a running sequence there waits for a page
    fetch_work: float = 0.0  # what the fetch takes, in prefill tokens; those queued before are computed meanwhile


def admissible(load: GroupLoad) -> bool:
    """Whether the sequence may start there now: a row, its pages, and head room for those who run.

    An empty group needs no head room, so a sequence that fits a pool alone always starts in the end.
    """
    head_room = max(1, int(load.total * WATERMARK)) if load.running else 0
    return load.free_rows > 0 and not load.starving and load.available - load.new_pages >= head_room


def time_to_first_token(load: GroupLoad, tokens: int, page_size: int) -> float:
    """Estimated work before the first token, and what it costs those who follow, in prefill-token equivalents.

    Uncached prompt, prefill queued before it, decode load, and cached pages that would be lost. Taking the longest prefix
    first and the load second collapses on real traces, where all requests share a first page: costs must be added up.
    """
    uncached = tokens - load.hit_tokens
    evicted = max(0, load.new_pages - load.free)
    wait = max(float(load.backlog), load.fetch_work) + FETCH_WEIGHT * load.fetch_work
    return UNCACHED_WEIGHT * uncached + wait + DECODE_WEIGHT * load.running + EVICTION_WEIGHT * page_size * evicted


def route(loads: Iterable[GroupLoad], tokens: int, page_size: int) -> int | None:
    """Index of the cheapest admissible group; ties go to the one with more available pages, then to the first. None: wait."""
    costs = (
        (time_to_first_token(load, tokens, page_size), -load.available, index)
        for index, load in enumerate(loads)
        if admissible(load)
    )
    best = min(costs, default=None)
    return None if best is None else best[2]


def choose_victim(needy: Sequence, running: Iterable[Sequence]) -> Sequence | None:
    """Who gives its pages to `needy`: the last in the order of service; None if that is `needy` itself.

    So the first sequence of a group always progresses, and nothing waits for nothing.
    """
    victim = max(running, default=needy)
    return victim if needy < victim else None

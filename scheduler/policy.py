"""Where a sequence goes, whether it may start, and who makes room. Pure functions over snapshots; no state, no clock.

Imports nothing of Manta. To try another policy, replace a function here; the core asks nothing else.
"""

from collections.abc import Iterable
from typing import NamedTuple

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
    running: int  # those whose prefix is on its way there included, here and below
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


class VictimCost(NamedTuple):
    """A running sequence that could give its pages up."""

    lost_tokens: int  # KV that nobody else has, to be computed again
    freed_pages: int  # that nobody else holds
    output_tokens: int  # sampled so far
    place: int  # in the order of service: by priority, then by arrival


def choose_victim(candidates: Iterable[VictimCost], page_size: int) -> int | None:
    """Index of the one whose pages are cheapest to rebuild, None if there is no candidate.

    By tokens to compute again for each page freed, in eighths of a page: less is how full the last page happens to be. Then by
    progress, in pages of output; then the less urgent; then the younger. Where all share every page with each other nobody
    frees any at first; then it is the last in the order of service, and the next call finds more.
    """
    costs = (
        (not each.freed_pages, *_rebuilding(each, page_size), -each.place, index) for index, each in enumerate(candidates)
    )
    best = min(costs, default=None)
    return None if best is None else best[-1]


def _rebuilding(victim: VictimCost, page_size: int) -> tuple[int, int]:
    if not victim.freed_pages:
        return 0, 0
    return 8 * victim.lost_tokens // (victim.freed_pages * page_size), victim.output_tokens // page_size

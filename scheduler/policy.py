"""Where a sequence goes, whether it may start, and who makes room. Pure functions over snapshots; no state, no clock.

Imports NumPy and `Sequence`. To try another policy, replace a function here; the core asks nothing else.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scheduler.sequence import Sequence

DECODE_WEIGHT = 16.0
"""Prefill tokens whose work one running sequence stands for while a newcomer waits for its first token."""

EVICTION_WEIGHT = 0.25
"""Share of an evicted page's tokens that is expected to be asked for again, hence computed again."""

WATERMARK = 0.01
"""Share of a pool that admission leaves to the growth of the sequences that run there."""


@dataclass(frozen=True, slots=True)
class GroupLoads:
    """All groups that could take one sequence, side by side; every array is [groups]."""

    hit_pages: npt.NDArray[np.int64]  # pages of its prefix that the group holds
    new_pages: npt.NDArray[np.int64]  # pages that it needs from free or cached ones, revived hits included
    free: npt.NDArray[np.int64]  # pages that hold nothing
    available: npt.NDArray[np.int64]  # free or cached
    total: npt.NDArray[np.int64]
    free_rows: npt.NDArray[np.int64]
    running: npt.NDArray[np.int64]
    backlog: npt.NDArray[np.int64]  # prefill tokens granted but not yet computed
    starving: npt.NDArray[np.bool_]  # a running sequence there waits for a page


def admissible(loads: GroupLoads) -> npt.NDArray[np.bool_]:
    """[groups] where the sequence may start now: a row, its pages, and head room for those who run.

    An empty group needs no head room, so a sequence that fits a pool alone always starts in the end.
    """
    head_room = np.where(loads.running > 0, np.maximum(1, (loads.total * WATERMARK).astype(np.int64)), 0)
    return (loads.free_rows > 0) & ~loads.starving & (loads.available - loads.new_pages >= head_room)


def time_to_first_token(loads: GroupLoads, tokens: int, page_size: int) -> npt.NDArray[np.float64]:
    """[groups] estimated work before the first token, in prefill-token equivalents.

    Uncached prompt, prefill queued before it, decode load, and cached pages that would be lost. Taking the longest prefix
    first and the load second collapses on real traces, where all requests share a first page: costs must be added up.
    """
    uncached = tokens - loads.hit_pages * page_size
    evicted = np.maximum(0, loads.new_pages - loads.free)
    cost: npt.NDArray[np.float64] = (
        uncached + loads.backlog + DECODE_WEIGHT * loads.running + EVICTION_WEIGHT * page_size * evicted
    )
    return cost


def route(loads: GroupLoads, tokens: int, page_size: int) -> int | None:
    """Index of the cheapest admissible group; ties go to the one with more available pages, then to the first. None: wait."""
    allowed = admissible(loads)
    if not allowed.any():
        return None
    cost = np.where(allowed, time_to_first_token(loads, tokens, page_size), np.inf)
    best = np.flatnonzero(cost == cost.min())
    return int(best[np.argmax(loads.available[best])])


def choose_victim(needy: Sequence, running: Iterable[Sequence]) -> Sequence | None:
    """Who gives its pages to `needy`: the youngest in the group, always younger than `needy`; None if it is the youngest.

    So the oldest sequence of a group always progresses, and nothing waits for nothing.
    """
    victim = max(running, default=needy)
    return victim if victim.number > needy.number else None

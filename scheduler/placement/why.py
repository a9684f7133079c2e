"""Why a sequence went where it did: one record for each decision, for debug logs and for replays. Built only if somebody asks.

Imports `policy`, `logs` and the ids.
"""

import logging
from collections.abc import Callable, Iterable

import msgspec

from kvcache.ids import GroupId
from scheduler import policy
from scheduler.logs import fields

logger = logging.getLogger(__name__)


class Way(msgspec.Struct, frozen=True):
    """One way to serve a sequence: in a group, as it is or with a fetch from `source`.

    hit_tokens: of its prefix, fetched_tokens of them from `source`. evicted_blocks: that would be lost. cost: in prefill
    tokens, the sum of `policy.CostTerms`, which follow.
    """

    group: int
    hit_tokens: int
    source: int | None
    fetched_tokens: int
    evicted_blocks: int
    cost: float
    uncached: float
    queued: float
    fetch: float
    decoding: float
    evicted: float


class Decision(msgspec.Struct, frozen=True):
    """A sequence of `tokens` tokens, which waited for `waited_s`, starts (or fetches first, then starts) at `at_s`.

    chosen: the cheapest of so many admissible `ways`. runner_up: the next; None: there is no other.
    """

    at_s: float
    front_end: int
    stream: int
    tokens: int
    waited_s: float
    preemptions: int
    ways: int
    chosen: Way
    runner_up: Way | None


Seen = tuple[GroupId, policy.GroupLoad, int, GroupId | None]
"""A way as routing sees it: the group, with its load; tokens of the hit that it has itself; the source of the others."""

Tell = Callable[[Decision], None]


def show() -> None:
    """From now on this process's log takes a line for each decision, if it has a handler for debug lines."""
    logger.setLevel(logging.DEBUG)


def log(decision: Decision) -> None:
    """One line; of the two ways what differs from 0."""
    said = msgspec.to_builtins(decision)
    ways = {"": said.pop("chosen"), "other_": said.pop("runner_up") or {}}
    for prefix, way in ways.items():
        said |= {prefix + name: value for name, value in way.items() if value or name in ("group", "source")}
    logger.debug("routed", extra=fields(**said))


def rank(seen: Iterable[Seen], tokens: int, block_size: int) -> list[Way]:
    """The admissible ways, the cheapest first, as `policy.route` orders them. seen: by group, each group's ways in order."""
    order = []
    for at, (group, load, own_tokens, source) in enumerate(seen):
        if policy.admissible(load):
            terms = policy.terms(load, tokens, block_size)
            way = Way(group, load.hit_tokens, source, load.hit_tokens - own_tokens, load.evicted, sum(terms), *terms)
            order.append((way.cost, -load.available, at, way))
    return [way for *_, way in sorted(order, key=lambda each: each[:3])]

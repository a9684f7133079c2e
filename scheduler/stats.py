"""The cluster at one moment, for people and for metrics. Read from the core, sent as it is.

Imports the core.
"""

import msgspec

from scheduler.config import Counters
from scheduler.core import SchedulerCore


class GroupStats(msgspec.Struct, frozen=True):
    """One group at one moment. total_blocks = free_blocks + held_blocks + cached_blocks. running: sequences with a lease."""

    group: int
    up: bool
    total_blocks: int
    free_blocks: int
    held_blocks: int
    cached_blocks: int
    running: int


class EngineStats(Counters, frozen=True, kw_only=True):  # type: ignore[misc]  # dataclasses forbid it, msgspec does not
    """The cluster at one moment, and its counters since the start, frozen as it is sent. waiting: sequences without a group."""

    groups: tuple[GroupStats, ...]
    waiting: int = 0


def snapshot(core: SchedulerCore) -> EngineStats:
    """Costs time linear in the number of groups and live sequences."""
    groups = []
    for name, group in core.groups.items():
        usage = core.table.usage(name)
        groups.append(
            GroupStats(
                group=name,
                up=True,
                total_blocks=usage.total,
                free_blocks=usage.free,
                held_blocks=usage.held,
                cached_blocks=usage.cached,
                running=len(group.running),
            )
        )
    groups += [GroupStats(name, False, blocks, 0, 0, 0, 0) for name, blocks in core.expected.items()]
    return EngineStats(
        groups=tuple(sorted(groups, key=lambda group: group.group)),
        waiting=len(core.sequences) - sum(group.running for group in groups),
        **msgspec.structs.asdict(core.counters),
    )

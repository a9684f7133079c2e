"""The cluster at one moment, for people, for metrics and for the autoscaler. Read from the core, sent as it is.

Imports the core.
"""

import msgspec

from kvcache.ids import narrow_of
from scheduler.core import SchedulerCore
from scheduler.protocol.messages import TalliedMetric
from scheduler.state.counters import Counters
from scheduler.state.resident import ResidentGroup


class GroupStats(msgspec.Struct, frozen=True):
    """One group at one moment. total_blocks = free_blocks + held_blocks + cached_blocks. running: sequences with a lease.
    fetching: those whose prefix is on its way there.

    shared_blocks: held by more than one sequence. starved: running sequences that wait for a block. draining: takes no new
    sequences. backlog_tokens: prefill granted but not computed. Since the group came up: evictions of cached blocks; steps,
    their time and the tokens that they computed and sampled; lease_waits: times a sequence found no block to grow into.
    expert_layers, expert_imbalance, expert_busiest: of a model with experts, as in `ExpertBalance`. narrow_blocks: of layers
    that see a window beside others that see all, which have a pool of their own; free, held, and evictions of it.
    """

    group: int
    up: bool
    total_blocks: int
    free_blocks: int
    held_blocks: int
    cached_blocks: int
    running: int
    epoch: int = -1
    shared_blocks: int = 0
    starved: int = 0
    draining: bool = False
    backlog_tokens: int = 0
    evictions: int = 0
    steps: int = 0
    step_s: float = 0.0
    step_tokens: int = 0
    lease_waits: int = 0
    starts: int = 0
    fetching: int = 0
    expert_layers: tuple[int, ...] = ()
    expert_imbalance: tuple[float, ...] = ()
    expert_busiest: tuple[int, ...] = ()
    narrow_blocks: int = 0
    narrow_free_blocks: int = 0
    narrow_held_blocks: int = 0
    narrow_evictions: int = 0


class EngineStats(Counters, frozen=True, kw_only=True):  # type: ignore[misc]  # dataclasses forbid it, msgspec does not
    """The cluster at one moment, and its counters since the start, frozen as it is sent.

    waiting: sequences without blocks; preempted: those of them that had one before. waiting_tokens: their prompt and output
    so far; waiting_tenants: whose they are. oldest_wait_s: how long the longest-waiting newcomer has waited. tokens_per_s:
    recently computed, cluster-wide.
    """

    groups: tuple[GroupStats, ...]
    waiting: int = 0
    preempted: int = 0
    waiting_tokens: int = 0
    oldest_wait_s: float = 0.0
    tokens_per_s: float = 0.0
    waiting_tenants: int = 0


class PoolMap(msgspec.Struct, frozen=True):
    """Every block of one group's pool: states[i] is 0 free, 1 held, 2 shared, 3 cached."""

    group: int
    states: bytes


class GroupStart(msgspec.Struct, frozen=True):
    """A group that is coming up. phase: "placing", "loading weights", "measuring memory". done of total; 0 of 0: unknown."""

    group: int
    phase: str
    done: int = 0
    total: int = 0


class ClusterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the endpoint knows of its cluster. phase: "starting", "ready", "degraded" (no group is up) or "stopped".

    model, revision: as the settings of those names, exactly what is served. progress: what the start has said, in words, the
    newest last. starting: groups that are coming up. epoch: counts schedulers; a restart begins anew.
    uptime_s, busy_s: of the scheduler, and how much of it was spent inside the core. front_ends: connected ones.
    tallies: metrics that the front ends have observed, summed up.
    """

    phase: str
    model: str = ""
    revision: str | None = None
    block_size: int = 0
    epoch: int = 0
    progress: tuple[str, ...] = ()
    starting: tuple[GroupStart, ...] = ()
    engine: EngineStats | None = None
    maps: tuple[PoolMap, ...] = ()
    tallies: tuple[TalliedMetric, ...] = ()
    uptime_s: float = 0.0
    busy_s: float = 0.0
    front_ends: int = 0
    target_groups: int = 0

    @property
    def ready(self) -> bool:
        return self.engine is not None and any(group.up for group in self.engine.groups)

    @property
    def obstacle(self) -> str | None:
        """Why no group takes requests, in a few words; None: one does."""
        if self.ready:
            return None
        placing = [start.group for start in self.starting if start.phase == "placing"]
        return f"{self.phase}, and group {placing[0]} waits for room" if placing else self.phase


def snapshot(core: SchedulerCore) -> EngineStats:
    """Costs time linear in the number of groups and live sequences."""
    groups = [_group_stats(core, group) for group in core.groups.values()]
    absent = core.expected | {name: rest.blocks for name, rest in core.resting.items()}
    groups += [GroupStats(name, False, blocks, 0, 0, 0, 0) for name, blocks in absent.items()]
    waiting = [sequence for sequence in core.sequences.values() if sequence.blocks is None]
    newcomers = [sequence.arrived_s for sequence in waiting if sequence.cached_tokens is None]
    return EngineStats(
        groups=tuple(sorted(groups, key=lambda group: group.group)),
        waiting=core.waiting.count,
        preempted=len(waiting) - len(newcomers),
        waiting_tokens=core.waiting.tokens,
        waiting_tenants=core.waiting.fair.tenants,
        oldest_wait_s=core.now_s - min(newcomers, default=core.now_s),
        tokens_per_s=core.computed.per_s(core.now_s),
        **msgspec.structs.asdict(core.counters),
    )


def pool_maps(core: SchedulerCore) -> tuple[PoolMap, ...]:
    """The state of every block of the groups that are up. Linear in the blocks: some milliseconds for a large pool."""
    return tuple(PoolMap(group, core.table.states(group)) for group in sorted(core.groups))


def _group_stats(core: SchedulerCore, group: ResidentGroup) -> GroupStats:
    pool, narrow = core.table.pools[group.group], core.table.pools.get(narrow_of(group.group))
    return GroupStats(
        group=group.group,
        up=True,
        total_blocks=pool.total,
        free_blocks=pool.free,
        held_blocks=pool.held,
        cached_blocks=pool.cached,
        running=len(group.running),
        epoch=group.epoch,
        shared_blocks=pool.shared,
        starved=len(group.starved),
        draining=group.draining,
        backlog_tokens=group.backlog,
        evictions=pool.evictions,
        steps=group.steps,
        step_s=group.step_s,
        step_tokens=group.step_tokens,
        lease_waits=group.lease_waits,
        starts=group.starts,
        fetching=len(group.fetching),
        expert_layers=group.experts.layers,
        expert_imbalance=group.experts.imbalance,
        expert_busiest=group.experts.busiest,
        narrow_blocks=0 if narrow is None else narrow.total,
        narrow_free_blocks=0 if narrow is None else narrow.free,
        narrow_held_blocks=0 if narrow is None else narrow.held,
        narrow_evictions=0 if narrow is None else narrow.evictions,
    )
